"""What a single file's UNet predicts: told by the user, by marks in it, or by the .yaml beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compvis import State, save, to_single_file
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from sd_export.networks.text_encoder import load_text_encoder
from sd_export.networks.unet import load_unet
from sd_export.source import resolve_checkpoint
from sd_runtime.errors import ExportError
from sd_runtime.sampling import SchedulerConfig, make_plan
from transformers import CLIPTextConfig, CLIPTextModel

YAML = 'model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: "{}"\n'


@pytest.fixture(scope="module")
def state(tiny) -> State:
    return to_single_file(tiny.text_encoder, tiny.unet, tiny.vae)


def scheduler(path: Path, **options: Any) -> Any:
    return resolve_checkpoint(str(path), **options).configs["scheduler"]


def test_noise_where_nothing_else_is_told(state, tmp_path) -> None:
    assert "prediction_type" not in scheduler(save(tmp_path / "m.safetensors", state))


@pytest.mark.parametrize("written", ["v", "eps"])
def test_the_yaml_beside_it_tells(state, tmp_path, written) -> None:
    """diffusers reads it the same way, where it is handed the file."""
    path = save(tmp_path / "my v1.5 model.safetensors", state)
    path.with_suffix(".yaml").write_text(YAML.format(written))
    checkpoint = resolve_checkpoint(str(path))
    assert checkpoint.configs["scheduler"]["prediction_type"] == {"v": "v_prediction", "eps": "epsilon"}[written]
    assert set(checkpoint.files) == {path.name, "my v1.5 model.yaml"}  # another .yaml is another checkpoint


def test_marks_in_the_file_tell(state, tmp_path) -> None:
    path = save(tmp_path / "m.safetensors", state | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    config = scheduler(path)
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    plan = make_plan(SchedulerConfig.from_dict({**config, "_class_name": "EulerDiscreteScheduler"}), 5)
    assert plan.timesteps[0] == 999  # it begins where there is no signal


def test_the_user_has_the_last_word(state, tiny, tmp_path) -> None:
    path = save(tmp_path / "m.safetensors", state | {"v_pred": torch.zeros(0)})
    path.with_suffix(".yaml").write_text("not: [valid")
    assert scheduler(path, prediction_type="epsilon")["prediction_type"] == "epsilon"
    assert scheduler(tiny.folder, prediction_type="v_prediction")["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [b", "is not valid YAML .*--prediction-type"),
        (YAML.format("x0"), "parameterization: got x0, accepted v, eps"),
        ("a: &a [*a, *a]\n" + "b" * (1 << 20), "is too large"),
    ],
)
def test_a_yaml_that_cannot_be_read_is_named(state, tmp_path, text, message) -> None:
    path = save(tmp_path / "m.safetensors", state)
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(ExportError, match=message):
        resolve_checkpoint(str(path))


@pytest.mark.parametrize("text", ["", "just a text", "- a\n- list", "model: 3", "model: {params: {}}"])
def test_a_yaml_that_says_nothing_of_it_is_left_alone(state, tmp_path, text) -> None:
    path = save(tmp_path / "m.safetensors", state)
    path.with_suffix(".yaml").write_text(text)
    assert "prediction_type" not in scheduler(path)


# ---- Stable Diffusion 2.x --------------------------------------------------------------------------------------------

OPEN_CLIP = "cond_stage_model.model."
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def to_open_clip(text_encoder: CLIPTextModel) -> State:
    """A CLIP text encoder in OpenCLIP's naming, with one more layer, which Stable Diffusion 2.x does not run."""
    ours = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    width, layers = text_encoder.config.hidden_size, text_encoder.config.num_hidden_layers
    state = {
        "token_embedding.weight": ours["embeddings.token_embedding.weight"],
        "positional_embedding": ours["embeddings.position_embedding.weight"],
        "ln_final.weight": ours["final_layer_norm.weight"],
        "ln_final.bias": ours["final_layer_norm.bias"],
        "text_projection": torch.eye(width),
        "logit_scale": torch.ones(()),
        "attn_mask": torch.zeros(77, 77),
    }
    for number in range(layers + 1):
        old, new = f"encoder.layers.{min(number, layers - 1)}.", f"transformer.resblocks.{number}."
        for kind in ("weight", "bias"):
            parts = [ours[f"{old}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            state[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
            for ours_name, theirs in LAYER.items():
                state[f"{new}{theirs}.{kind}"] = ours[f"{old}{ours_name}.{kind}"].clone()
    return {OPEN_CLIP + name: tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def second(tiny) -> tuple[State, CLIPTextModel, UNet2DConditionModel]:
    """A tiny Stable Diffusion 2.x: OpenCLIP's text encoder, linear projections, heads 64 wide."""
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        hidden_act="gelu", projection_dim=512, eos_token_id=2,
    )  # fmt: skip
    text_encoder = CLIPTextModel(config).eval()
    unet = UNet2DConditionModel(
        block_out_channels=(64, 64, 128, 128), layers_per_block=1, cross_attention_dim=128, sample_size=8,
        attention_head_dim=(1, 1, 2, 2), use_linear_projection=True,
    ).eval()  # fmt: skip
    clip = to_single_file(tiny.text_encoder, unet, tiny.vae)
    others = {name: tensor for name, tensor in clip.items() if not name.startswith("cond_stage_model.")}
    return others | to_open_clip(text_encoder), text_encoder, unet


def test_a_file_of_2_x_asks_for_what_it_cannot_tell(second, tmp_path) -> None:
    path = save(tmp_path / "v2-1.safetensors", second[0])
    with pytest.raises(ExportError, match=r"Stable Diffusion 2\.x as a single file.*say it with --prediction-type"):
        resolve_checkpoint(str(path))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_file_of_2_x_holds_its_networks(second, tmp_path, prediction) -> None:
    state, text_encoder, unet = second
    path = save(tmp_path / "v2-1.safetensors", state)
    checkpoint = resolve_checkpoint(str(path), prediction_type=prediction)
    assert checkpoint.configs["scheduler"]["prediction_type"] == prediction
    assert checkpoint.configs["unet"]["sample_size"] == (96 if prediction == "v_prediction" else 64)
    assert json.loads(checkpoint.tokenizer["special_tokens_map.json"])["pad_token"] == "!"
    ids = torch.randint(0, 49000, (1, 77))
    with torch.no_grad():
        expected = text_encoder(ids).last_hidden_state
        assert torch.equal(load_text_encoder(checkpoint)(ids).last_hidden_state, expected)
        sample, hidden = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 128)
        got = load_unet(checkpoint)(sample, 7, hidden).sample
        assert torch.allclose(got, unet(sample, 7, hidden).sample, atol=1e-5)


def test_true_sizes_give_the_published_configs_of_2_1() -> None:
    from sd_export.source.prediction import Prediction
    from sd_export.source.single_file import infer_configs

    config = {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "sample_size": 96,
    }
    with torch.device("meta"):
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, vocab_size=49408
            )
        )
        unet, vae = UNet2DConditionModel.from_config(config), StableDiffusionVae.make()
        clip = to_single_file(text, unet, vae)
        state = {n: t for n, t in clip.items() if not n.startswith("cond_stage_model.")} | to_open_clip(text)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    configs = infer_configs("true sizes", shapes, Prediction("v_prediction"))
    assert {name: configs["unet"][name] for name in config} == config
    text_config = configs["text_encoder"]
    assert [text_config[n] for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act")] == [
        1024, 23, 16, "gelu",
    ]  # fmt: skip
    assert configs["scheduler"]["_class_name"] == "DDIMScheduler"


class StableDiffusionVae:
    @staticmethod
    def make() -> Any:
        from diffusers import AutoencoderKL
        from sd_export.source.families import sd1

        return AutoencoderKL.from_config(sd1.VAE)


@pytest.mark.slow
def test_a_v_picture_equals_diffusers(state, tiny, tmp_path) -> None:
    """The whole way: exported by its .yaml, drawn, and compared with diffusers told the same."""
    import numpy as np
    from sd_export.exporter import export
    from sd_export.options import ExportOptions
    from sd_runtime import Pipeline

    path = save(tmp_path / "v.safetensors", state)
    path.with_suffix(".yaml").write_text(YAML.format("v"))
    bundle = export(ExportOptions(str(path), output=tmp_path / "bundle", verify=False))
    reference = StableDiffusionPipeline.from_single_file(
        str(path), config=str(tiny.folder), local_files_only=True, safety_checker=None
    )
    reference.scheduler = type(reference.scheduler).from_config(
        reference.scheduler.config, prediction_type="v_prediction"
    )
    reference.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64}
    theirs = reference("a cat", latents=torch.from_numpy(latents), output_type="latent", **arguments).images.numpy()
    with Pipeline.load(bundle, device="cpu") as pipeline:
        ours = pipeline("a cat", latents=latents, decode=False, **arguments).latents
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-3
