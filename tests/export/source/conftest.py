"""Tiny random Stable Diffusion 1.x checkpoints, made and saved by diffusers and transformers themselves."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from sd_export.source import tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tiny:
    """The folder that diffusers saved, and the networks it was saved from."""

    folder: Path
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """All block types of Stable Diffusion 1.x, CLIP's real vocabulary, 5 million weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 96), layers_per_block=1, cross_attention_dim=64, sample_size=8
    )
    levels = 4
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=64,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            projection_dim=64,
            eos_token_id=2,
        )
    )
    files = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer.clip().items():
        (files / name).write_bytes(content)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(files),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, skip_prk_steps=True
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return Tiny(folder, text_encoder.eval(), unet.eval(), vae.eval())


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "tiny"))


@pytest.fixture
def old_folder(folder: Path) -> Path:
    """The tiny checkpoint as Stable Diffusion 1.5 lies on the hub: fp16 files only, keys of 2022."""
    old_attention = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old_vae(name: str) -> str:
        for new, old in old_attention.items():
            name = name.replace(new, old) if ".attentions." in name else name
        return name

    def rewrite(path: Path, state: State) -> None:
        save_file({name: t.half() if t.is_floating_point() else t for name, t in state.items()}, path)

    text, unet, vae = (
        folder / n for n in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    )
    state = {"text_model." + name.removeprefix("text_model."): t for name, t in _take(text).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    rewrite(text.with_suffix(".fp16.safetensors"), state)
    rewrite(unet.with_suffix(".fp16.safetensors"), _take(unet))
    rewrite(vae.with_suffix(".fp16.safetensors"), {old_vae(name): t for name, t in _take(vae).items()})
    return folder


def _take(stem: Path) -> State:
    path = stem.with_suffix(".safetensors")
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    return state
