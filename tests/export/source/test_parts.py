"""A safety checker beside the networks, another VAE, a tiny decoder: where they are found and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from sd_export.networks.safety_checker import load_safety_checker
from sd_export.networks.taesd import load_taesd
from sd_export.networks.vae import load_vae
from sd_export.source import resolve_checkpoint, with_taesd, with_vae
from sd_runtime.errors import ExportError, UsageError

SAFETY_WEIGHTS = "safety_checker/model.safetensors"


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_same_weights(module: torch.nn.Module, reference: torch.nn.Module) -> None:
    state, expected = module.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in expected.items())


# ---- the safety checker ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker() -> Any:
    return tiny_checkpoints.safety_checker()


@pytest.fixture
def checked(folder: Path, checker: Any) -> Path:
    """The tiny checkpoint with a safety checker, as diffusers saves it."""
    checker.save_pretrained(folder / "safety_checker")
    tiny_checkpoints.image_processor().save_pretrained(folder / "feature_extractor")
    entry = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    edit_json(folder / "model_index.json", **entry, feature_extractor=["transformers", "CLIPImageProcessor"])
    return folder


def test_safety_checker_is_found(checked: Path, checker: Any) -> None:
    checkpoint = resolve_checkpoint(str(checked))
    assert_same_weights(load_safety_checker(checkpoint), checker)
    assert checkpoint.configs["feature_extractor"]["crop_size"] == {"height": 30, "width": 30}
    named = {"safety_checker/config.json", SAFETY_WEIGHTS, "feature_extractor/preprocessor_config.json"}
    assert named < checkpoint.files.keys()


def test_safety_checker_of_2022(checked: Path, checker: Any) -> None:
    """In its files the vision transformer is wrapped twice, and position_ids are stored."""
    path = checked / SAFETY_WEIGHTS
    state = {name.replace("vision_model.", "vision_model.vision_model.", 1): t for name, t in load_file(path).items()}
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    path.unlink()
    save_file({name: t.clone() for name, t in state.items()}, path)
    assert_same_weights(load_safety_checker(resolve_checkpoint(str(checked))), checker)


def test_safety_checker_is_left_out_on_request(checked: Path) -> None:
    shutil.rmtree(checked / "safety_checker")
    checkpoint = resolve_checkpoint(str(checked), safety_checker=False)
    assert "safety_checker" not in checkpoint.weights
    assert not any(name.startswith(("safety_checker", "feature_extractor")) for name in checkpoint.files)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("safety_checker/config.json", "is incomplete: safety_checker/config.json missing"),
        ("feature_extractor/preprocessor_config.json", "is incomplete: feature_extractor/preprocessor_config.json"),
        (SAFETY_WEIGHTS, "has no weights for safety_checker"),
    ],
)
def test_incomplete_safety_checkers_say_how_to_go_without(checked: Path, missing: str, message: str) -> None:
    (checked / missing).unlink()
    with pytest.raises(ExportError, match=message) as caught:
        resolve_checkpoint(str(checked))
    assert "to export without it: --components text_encoder,unet,vae_decoder,vae_encoder" in str(caught.value)


def test_pickled_safety_checkers_say_how_to_go_without(checked: Path) -> None:
    (checked / SAFETY_WEIGHTS).rename(checked / "safety_checker/pytorch_model.bin")
    with pytest.raises(ExportError, match=r"pytorch_model\.bin is a pickle.*to export without it: --components"):
        resolve_checkpoint(str(checked))


# ---- another VAE -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AutoencoderKL]:
    """Alone in a folder."""
    network, folder = tiny_checkpoints.tiny_vae(seed=5, scaling_factor=0.5), tmp_path_factory.mktemp("vae") / "my-vae"
    network.save_pretrained(folder)
    return folder, network


def test_vae_from_a_folder_of_its_own(folder: Path, vae: tuple[Path, AutoencoderKL]) -> None:
    own = resolve_checkpoint(str(folder))
    checkpoint = with_vae(own, str(vae[0]))
    assert_same_weights(load_vae(checkpoint), vae[1])
    assert checkpoint.configs["vae"]["scaling_factor"] == 0.5
    assert checkpoint.parts["vae"].id == "my-vae"
    assert checkpoint.parts["vae"].files.keys() == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert checkpoint.files == own.files


def test_vae_of_another_checkpoint(folder: Path, tiny: Any) -> None:
    checkpoint = with_vae(resolve_checkpoint(str(folder)), str(tiny.folder))
    assert_same_weights(load_vae(checkpoint), tiny.vae)
    assert checkpoint.parts["vae"].files.keys() == {
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_damaged_vae_is_named(folder: Path, vae: tuple[Path, AutoencoderKL], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(vae[0], tmp_path / "copy"))
    weights = copy / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ExportError, match="not an intact safetensors file"):
        with_vae(resolve_checkpoint(str(folder)), str(copy))


def test_what_is_no_vae(folder: Path, tmp_path: Path, vae: tuple[Path, AutoencoderKL]) -> None:
    checkpoint = resolve_checkpoint(str(folder))
    unet = shutil.copytree(folder / "unet", tmp_path / "unet")
    with pytest.raises(ExportError, match="got UNet2DConditionModel, accepted AutoencoderKL"):
        with_vae(checkpoint, str(unet))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=r"has no AutoencoderKL: accepted vae/config\.json or config\.json"):
        with_vae(checkpoint, str(tmp_path / "empty"))
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ExportError, match=r"does not have the tensors of a Stable Diffusion 1\.x VAE"):
        with_vae(checkpoint, str(tmp_path / "x.safetensors"))
    (tmp_path / "x.ckpt").write_bytes(b"pickle")
    with pytest.raises(ExportError, match=r"x\.ckpt is a pickle"):
        with_vae(checkpoint, str(tmp_path / "x.ckpt"))
    with pytest.raises(UsageError, match="vae: got /no/such, accepted a folder in diffusers layout, or a hub id"):
        with_vae(checkpoint, "/no/such")


def test_vae_of_other_latents_does_not_fit(folder: Path, tmp_path: Path) -> None:
    tiny_checkpoints.tiny_vae(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(ExportError, match=r"does not fit .* got 16 latent channels, 8 pixels a cell, accepted 4 and 8"):
        with_vae(resolve_checkpoint(str(folder)), str(tmp_path / "wide"))


def test_a_controlnet_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    with pytest.raises(ExportError, match=r"is one network \(ControlNetModel\): accepted a folder with model_index"):
        resolve_checkpoint(str(tmp_path))


def test_a_vae_is_no_model(vae: tuple[Path, AutoencoderKL]) -> None:
    with pytest.raises(ExportError, match=r"is one network \(AutoencoderKL\).*add it to a checkpoint with --vae"):
        resolve_checkpoint(str(vae[0]))


# ---- the tiny decoder ------------------------------------------------------------------------------------------------


def test_taesd(folder: Path, tmp_path: Path) -> None:
    network = tiny_checkpoints.tiny_taesd()
    network.save_pretrained(tmp_path / "taesd")
    checkpoint = with_taesd(resolve_checkpoint(str(folder)), str(tmp_path / "taesd"))
    assert_same_weights(load_taesd(checkpoint), network)
    assert_same_weights(load_vae(checkpoint), AutoencoderKL.from_pretrained(folder / "vae"))
    assert checkpoint.parts.keys() == {"taesd"}
    with pytest.raises(ExportError, match=r"is one network \(AutoencoderTiny\).*with --taesd"):
        resolve_checkpoint(str(tmp_path / "taesd"))


def test_a_vae_is_no_taesd(folder: Path, vae: tuple[Path, AutoencoderKL], tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(str(folder))
    with pytest.raises(ExportError, match="got AutoencoderKL, accepted AutoencoderTiny"):
        with_taesd(checkpoint, str(vae[0]))
    save_file({"0.weight": torch.ones(1)}, tmp_path / "taesd_decoder.safetensors")
    with pytest.raises(ExportError, match="is a file: accepted a folder in diffusers layout"):
        with_taesd(checkpoint, str(tmp_path / "taesd_decoder.safetensors"))
