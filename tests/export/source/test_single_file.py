"""Single-file checkpoints with CompVis' keys: made here by a mapping of our own, read back through diffusers'."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compvis import State, save, to_single_file
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from sd_export.networks.text_encoder import load_text_encoder
from sd_export.networks.unet import load_unet
from sd_export.networks.vae import load_vae
from sd_export.source import resolve_checkpoint, with_vae
from sd_export.source.single_file import infer_configs
from sd_runtime.errors import ExportError
from transformers import CLIPTextConfig, CLIPTextModel


@pytest.fixture(scope="module")
def state(tiny) -> State:
    return to_single_file(tiny.text_encoder, tiny.unet, tiny.vae)


@pytest.fixture(scope="module")
def single_file(state, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("single") / "My model v1.0.safetensors", state)


def test_networks_equal_the_ones_it_was_made_of(tiny, single_file) -> None:
    checkpoint = resolve_checkpoint(str(single_file))
    assert (checkpoint.name, checkpoint.revision) == ("My model v1.0", None)
    assert list(checkpoint.files) == [single_file.name]
    for network, load in {"text_encoder": load_text_encoder, "unet": load_unet, "vae": load_vae}.items():
        loaded, expected = load(checkpoint).state_dict(), getattr(tiny, network).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_configs_give_the_same_networks(tiny, single_file) -> None:
    """What the shapes do not tell is Stable Diffusion 1.5's; only the size of training pictures cannot be known."""
    configs = resolve_checkpoint(str(single_file)).configs
    for network, reference in {"unet": tiny.unet, "vae": tiny.vae}.items():
        built = dict(type(reference).from_config(configs[network]).config)
        for field in (f for f in reference.config if not f.startswith("_") and f != "sample_size"):
            expected = reference.config[field]
            assert built[field] == (list(expected) if isinstance(expected, tuple) else expected), field


def test_equals_diffusers_own_reading(tiny, single_file) -> None:
    reference = StableDiffusionPipeline.from_single_file(
        str(single_file), config=str(tiny.folder), local_files_only=True, safety_checker=None
    )
    checkpoint = resolve_checkpoint(str(single_file))
    for network, load in {"text_encoder": load_text_encoder, "unet": load_unet, "vae": load_vae}.items():
        loaded, expected = load(checkpoint).state_dict(), getattr(reference, network).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_half_precision_file_is_read_in_full(tiny, state, tmp_path) -> None:
    half = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in state.items()}
    loaded = load_unet(resolve_checkpoint(str(save(tmp_path / "half.safetensors", half)))).state_dict()
    expected = tiny.unet.state_dict()
    assert all(torch.equal(loaded[name], tensor.to(torch.bfloat16).float()) for name, tensor in expected.items())


def test_true_sizes_give_the_published_configs() -> None:
    """Stable Diffusion 1.5's own config.json files, from nothing but names and shapes."""
    unet_config = {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "act_fn": "silu",
        "attention_head_dim": 8,
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
    }
    vae_config = {
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    text_config = {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "vocab_size": 49408,
    }
    with torch.device("meta"):
        state = to_single_file(
            CLIPTextModel(CLIPTextConfig(**text_config)),
            UNet2DConditionModel.from_config(unet_config),
            AutoencoderKL.from_config(vae_config),
        )
    configs = infer_configs("true sizes", {name: tuple(tensor.shape) for name, tensor in state.items()})
    assert configs["unet"] == unet_config | {"_class_name": "UNet2DConditionModel"}
    assert configs["vae"] == vae_config | {"_class_name": "AutoencoderKL"}
    assert configs["text_encoder"] == text_config | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "first_stage" not in k}, "has no vae under"),
        (lambda s: {k: v for k, v in s.items() if "diffusion" not in k}, "has no unet under"),
        (
            lambda s: {k.replace("cond_stage_model.transformer", "cond_stage_model.model"): v for k, v in s.items()},
            "2.x",
        ),
        (lambda s: {k.replace("cond_stage_model", "conditioner.embedders.0"): v for k, v in s.items()}, "Diffusion XL"),
        (lambda s: {"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, "Stable Diffusion 3"),
        (lambda s: {"model.diffusion_model.double_blocks.0.x": torch.zeros(1)}, "Flux"),
        (lambda s: {"control_model.input_blocks.0.0.weight": torch.zeros(1)}, "ControlNet"),
        (lambda s: {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, "LoRA"),
        (lambda s: {"mid_block.resnets.0.norm1.weight": torch.zeros(1)}, "one network in diffusers' naming"),
        (lambda s: {"text_model.encoder.layers.0.x": torch.zeros(1)}, "text encoder on its own"),
        (lambda s: {}, "has no text_encoder, unet, vae under"),
        (lambda s: s | {INPUT: torch.zeros(32, 9, 3, 3)}, "an inpainting model"),
        (lambda s: s | {TOKENS: torch.zeros(1000, 64)}, "vocabulary of 1000 tokens"),
        (lambda s: {k: v for k, v in s.items() if k != INPUT}, "not have the tensors of Stable Diffusion 1.x"),
        (lambda s: s | {INPUT: torch.zeros(3)}, "not have the tensors of Stable Diffusion 1.x"),
    ],
)
def test_other_files_are_refused_by_name(state, tmp_path, change, message) -> None:
    path = save(tmp_path / "other.safetensors", change(state))
    with pytest.raises(ExportError, match=message) as caught:
        resolve_checkpoint(str(path))
    assert "\n" not in str(caught.value)


INPUT = "model.diffusion_model.input_blocks.0.0.weight"
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def test_missing_tensor_is_named(state, tmp_path) -> None:
    gone = "model.diffusion_model.out.0.bias"
    path = save(tmp_path / "gap.safetensors", {name: t for name, t in state.items() if name != gone})
    with pytest.raises(ExportError, match=r"missing conv_norm_out\.bias"):
        load_unet(resolve_checkpoint(str(path)))


def test_network_is_never_asked(single_file, tmp_path) -> None:
    """Reading, converting and loading a single file, with connections forbidden and an empty hub cache."""
    code = f"""
import sys, json
def forbid(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise SystemExit(f"{{event}} {{args}}")
sys.addaudithook(forbid)
from sd_export.networks.text_encoder import load_text_encoder
from sd_export.networks.unet import load_unet
from sd_export.networks.vae import load_vae
from sd_export.source import resolve_checkpoint
checkpoint = resolve_checkpoint({str(single_file)!r})
for load in (load_text_encoder, load_unet, load_vae):
    load(checkpoint)
print(json.dumps(sorted(checkpoint.tokenizer)))
"""
    env = {"HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert out.returncode == 0, out.stderr
    assert {"vocab.json", "merges.txt"} <= set(json.loads(out.stdout))


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.time_embed.cond_proj.weight",  # a latent consistency model's
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k_ip.weight",
        "first_stage_model.decoder.adapter.weight",
        "cond_stage_model.transformer.text_model.adapter.weight",
        "embedding_manager.string_to_param_dict.x",
        "conditioner.embedders.0.x",
        "something.else",
    ],
)
def test_tensors_of_another_model_are_named(state, tmp_path, name) -> None:
    """Dropping them would draw another picture without a word; folders refuse them, too."""
    path = save(tmp_path / "more.safetensors", state | {name: torch.zeros(2, 3)})
    with pytest.raises(ExportError, match=rf"{re.escape('.'.join(name.split('.')[-2:]))}|Stable Diffusion XL"):
        checkpoint = resolve_checkpoint(str(path))
        for load in (load_text_encoder, load_unet, load_vae):
            load(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "model_ema.diffusion_modelinput_blocks00weight",
        "model_ema.decay",
        "first_stage_model.loss.discriminator.main.0.weight",
        "first_stage_model.model_ema.decay",
        "betas",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef1",
        "logvar",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
    ],
)
def test_tensors_that_do_not_matter_are_left_where_they_are(tiny, state, tmp_path, name) -> None:
    checkpoint = resolve_checkpoint(str(save(tmp_path / "more.safetensors", state | {name: torch.zeros(2, 3)})))
    for network, load in {"text_encoder": load_text_encoder, "unet": load_unet, "vae": load_vae}.items():
        loaded, expected = load(checkpoint).state_dict(), getattr(tiny, network).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_file_without_a_vae_takes_one_from_elsewhere(tiny, state, tmp_path) -> None:
    path = save(tmp_path / "pruned.SAFETENSORS", {k: v for k, v in state.items() if "first_stage" not in k})
    with pytest.raises(ExportError, match=r"has no vae .*; add one from elsewhere with --vae"):
        resolve_checkpoint(str(path))
    checkpoint = with_vae(resolve_checkpoint(str(path), own_vae=False), str(tiny.folder))
    assert set(checkpoint.weights) == {"text_encoder", "unet", "vae"}
    assert torch.equal(load_vae(checkpoint).decoder.conv_in.weight, tiny.vae.decoder.conv_in.weight)
    assert torch.equal(load_unet(checkpoint).conv_in.weight, tiny.unet.conv_in.weight)


@pytest.mark.parametrize("alone", [True, False])
def test_only_its_vae(tiny, state, tmp_path, alone) -> None:
    """In the place of another checkpoint's: alone, as most VAEs are handed around, or in a whole checkpoint."""
    prefix = "first_stage_model."
    if alone:
        kept = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        state = kept | {"model_ema.decay": torch.ones(1), "loss.logvar": torch.ones(1)}
    path = save(tmp_path / "my-vae.safetensors", state)
    checkpoint = with_vae(resolve_checkpoint(str(tiny.folder)), str(path))
    loaded, expected = load_vae(checkpoint).state_dict(), tiny.vae.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert checkpoint.parts["vae"].id == "my-vae.safetensors"


def test_another_vae_for_a_single_file(tiny, single_file) -> None:
    checkpoint = with_vae(resolve_checkpoint(str(single_file)), str(tiny.folder))
    assert set(checkpoint.prefixes) == {"text_encoder", "unet"}
    assert torch.equal(load_vae(checkpoint).decoder.conv_in.weight, tiny.vae.decoder.conv_in.weight)
