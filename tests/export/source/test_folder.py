"""Checkpoints in diffusers layout: what is found, how it is loaded, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from sd_export.networks.text_encoder import load_text_encoder
from sd_export.networks.unet import load_unet
from sd_export.networks.vae import load_vae
from sd_export.source import resolve_checkpoint
from sd_runtime.errors import ExportError, UsageError
from transformers import CLIPTextConfig, CLIPTextModel

LOADERS = {"text_encoder": load_text_encoder, "unet": load_unet, "vae": load_vae}


def assert_same_weights(module: torch.nn.Module, reference: torch.nn.Module) -> None:
    state, expected = module.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in expected.items())


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_folder_is_described(tiny) -> None:
    checkpoint = resolve_checkpoint(str(tiny.folder))
    assert (checkpoint.id, checkpoint.name, checkpoint.revision) == (str(tiny.folder), "tiny", None)
    assert checkpoint.configs["unet"]["block_out_channels"] == [32, 64, 64, 96]
    assert checkpoint.configs["scheduler"]["_class_name"] == "PNDMScheduler"
    assert {"vocab.json", "merges.txt"} <= checkpoint.tokenizer.keys()
    assert set(checkpoint.weights) == {"text_encoder", "unet", "vae"}
    for name, digest in checkpoint.files.items():
        assert digest == hashlib.sha256((tiny.folder / name).read_bytes()).hexdigest()
    assert {str(path.relative_to(tiny.folder)) for (path,) in checkpoint.weights.values()} < checkpoint.files.keys()


def test_demo_is_found_without_a_path() -> None:
    checkpoint = resolve_checkpoint("demo")
    assert (checkpoint.id, checkpoint.name, checkpoint.revision) == ("demo", "demo", None)
    with torch.no_grad():
        assert load_unet(checkpoint)(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 77, 64)).sample.isfinite().all()


def test_networks_equal_the_saved_ones(tiny) -> None:
    checkpoint = resolve_checkpoint(str(tiny.folder))
    for network, load in LOADERS.items():
        module = load(checkpoint)
        assert_same_weights(module, getattr(tiny, network))
        assert not module.training
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.float32, False)}


def test_checkpoint_of_2022_loads_as_its_libraries_load_it(old_folder) -> None:
    checkpoint = resolve_checkpoint(str(old_folder))
    assert all(path.name.endswith(".fp16.safetensors") for (path,) in checkpoint.weights.values())
    references = {
        "text_encoder": CLIPTextModel.from_pretrained(old_folder / "text_encoder", variant="fp16"),
        "unet": UNet2DConditionModel.from_pretrained(old_folder / "unet", variant="fp16"),
        "vae": AutoencoderKL.from_pretrained(old_folder / "vae", variant="fp16"),
    }
    for network, load in LOADERS.items():
        assert_same_weights(load(checkpoint), references[network])


def test_text_encoder_gives_the_reference_states(tiny) -> None:
    ids = torch.tensor([[49406, 1929, 530, 7223, 7235, *[49407] * 72]])
    loaded = load_text_encoder(resolve_checkpoint(str(tiny.folder)))
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, tiny.text_encoder(ids).last_hidden_state)


def test_networks_of_stable_diffusion_2(folder) -> None:
    """Other attention heads, linear projections, GELU, and a text encoder without its last layer."""
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=(2, 4, 4, 6),
        use_linear_projection=True,
    )
    unet.save_pretrained(folder / "unet")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, hidden_act="gelu", projection_dim=32)
    )
    text_encoder.save_pretrained(folder / "text_encoder")
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    checkpoint = resolve_checkpoint(str(folder))
    assert checkpoint.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert_same_weights(load_unet(checkpoint), unet)
    assert_same_weights(load_text_encoder(checkpoint), text_encoder)
    assert load_unet(checkpoint).config.attention_head_dim == [2, 4, 4, 6]
    assert load_text_encoder(checkpoint).config.hidden_act == "gelu"


def test_full_precision_is_preferred_to_fp16(folder) -> None:
    shutil.copy(
        folder / "vae/diffusion_pytorch_model.safetensors", folder / "vae/diffusion_pytorch_model.fp16.safetensors"
    )
    assert resolve_checkpoint(str(folder)).weights["vae"][0].name == "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "Stable Diffusion XL"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "Stable Diffusion 3"),
        ({"_class_name": "FluxPipeline"}, "Flux"),
        ({"_class_name": "StableDiffusionControlNetPipeline"}, "a ControlNet"),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "an upscaler"),
        ({"_class_name": "StableDiffusionDepth2ImgPipeline"}, "a depth-to-image model"),
        ({"_class_name": "StableUnCLIPPipeline"}, "an unCLIP model"),
        ({"safety_checker": ["somewhere", "MyChecker"]}, "MyChecker as safety_checker"),
        ({"_class_name": "MyPipeline\nx"}, "another kind of model"),
        ({"_class_name": None}, "another kind of model"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny as vae"),
        ({"text_encoder": ["transformers", "BertModel"]}, "BertModel as text_encoder"),
        ({"unet": [None, None]}, "None as unet"),
    ],
)
def test_other_pipelines_are_refused_by_name(folder, fields, message) -> None:
    edit_json(folder / "model_index.json", **fields)
    with pytest.raises(ExportError, match=message) as caught:
        resolve_checkpoint(str(folder))
    assert "accepted text to image with Stable Diffusion 1.x, Stable Diffusion 2.x" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("unet", {"in_channels": 9}, "an inpainting model"),
        ("unet", {"in_channels": 8}, "InstructPix2Pix"),
        ("unet", {"in_channels": [4]}, "malformed"),
        ("unet", {"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ("unet", {"in_channels": 5}, "a depth-to-image model"),
        ("unet", {"class_embed_type": "projection"}, "an unCLIP model"),
        ("unet", {"out_channels": 8}, "latents do not have 4 channels"),
        ("vae", {"latent_channels": 16}, "latents do not have 4 channels"),
        ("unet", {"cross_attention_dim": 1024}, "do not fit together"),
    ],
)
def test_other_networks_are_refused(folder, part, fields, message) -> None:
    edit_json(folder / part / "config.json", **fields)
    with pytest.raises(ExportError, match=message):
        resolve_checkpoint(str(folder))


def test_config_and_weights_that_disagree_are_named(folder) -> None:
    edit_json(folder / "vae/config.json", block_out_channels=[32, 32, 64, 96])
    with pytest.raises(ExportError, match=r"vae.*does not hold the vae that its config describes: .* and \d+ more"):
        load_vae(resolve_checkpoint(str(folder)))


def test_config_that_describes_nothing_is_an_export_error(folder) -> None:
    edit_json(folder / "unet/config.json", down_block_types=["NoSuchBlock"] * 4)
    with pytest.raises(ExportError, match="no unet can be built from its config"):
        load_unet(resolve_checkpoint(str(folder)))


def test_missing_tensor_is_not_replaced_by_a_random_one(folder) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del state["conv_out.bias"]
    save_file(state, path)
    with pytest.raises(ExportError, match=r"missing conv_out\.bias$"):
        load_unet(resolve_checkpoint(str(folder)))


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_missing_config_is_named(folder, name) -> None:
    (folder / name).unlink()
    with pytest.raises(ExportError, match=f"{name} missing"):
        resolve_checkpoint(str(folder))


def test_missing_weights_are_named(folder) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"no weights for unet.*unet/diffusion_pytorch_model\.safetensors"):
        resolve_checkpoint(str(folder))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"[" * 100_000, b" " * (2 << 20)])
def test_malformed_json_is_named(folder, text) -> None:
    (folder / "vae/config.json").write_bytes(text)
    with pytest.raises(ExportError, match=r"vae/config\.json"):
        resolve_checkpoint(str(folder))


@pytest.mark.parametrize(
    "model",
    [
        "nonsense",
        "",
        "/no/such/folder",
        "./no.safetensors",
        "a/b/c",
        "x\0y",
        "a" * 5000,
        "\ud800/x",
        "~nobody-here/x",
        "a--b/c",
        "a..b/c",
        "a/b.git",
        "-a/b",
        "a/b-",
        "a/b.ckpt",
    ],
)
def test_what_is_no_model_is_a_usage_error(model) -> None:
    with pytest.raises(UsageError, match="accepted demo, a folder"):
        resolve_checkpoint(model)


def test_folder_without_model_index_is_refused(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"a folder with model_index\.json"):
        resolve_checkpoint(str(tmp_path))


def test_revision_is_for_the_hub(tiny) -> None:
    with pytest.raises(UsageError, match="revision: got main"):
        resolve_checkpoint(str(tiny.folder), revision="main")


def test_resolving_needs_neither_torch_nor_the_hub_client(tiny) -> None:
    code = (
        "import sys; from sd_export.source import resolve_checkpoint;"
        f"resolve_checkpoint({str(tiny.folder)!r});"
        "print({'torch', 'diffusers', 'transformers', 'huggingface_hub', 'onnx'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_links_that_lead_nowhere_are_not_called_absent(folder: Path, name: str) -> None:
    """As in a hub's cache whose blobs were removed."""
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123")
    with pytest.raises(ExportError, match=rf"{name} is a link to '../../blobs/0123', which is not there"):
        resolve_checkpoint(str(folder))


def test_a_model_that_is_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("gone")
    with pytest.raises(UsageError, match=r"model is a link to 'gone', which is not there"):
        resolve_checkpoint(str(tmp_path / "model"))
