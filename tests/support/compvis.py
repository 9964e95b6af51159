"""Networks as a single file with the keys of CompVis' Stable Diffusion, by a mapping of our own."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel

State = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_NAMES = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"\.to_([qkv])\.", r".\1."),
]


def unet_key(name: str, layers: int, attends: tuple[bool, ...]) -> str:
    """The CompVis key of a UNet parameter; `layers` a level, `attends` says which up levels have attention."""
    stem, _, kind = name.rpartition(".")
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{kind}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        index = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{index}.{unet_inner(match[3])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    assert match, name
    level, item = int(match[2]), int(match[4])
    if match[1] == "down":
        if match[3] == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.{match[5].replace('conv', 'op')}"
        return f"input_blocks.{1 + level * (layers + 1) + item}.{int(match[3] == 'attentions')}.{unet_inner(match[5])}"
    if match[3] == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.{1 + attends[level]}.{match[5]}"
    return f"output_blocks.{level * (layers + 1) + item}.{int(match[3] == 'attentions')}.{unet_inner(match[5])}"


def unet_inner(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{RESNET.get(first, first)}.{rest}"


def vae_key(name: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"(up\.\d)\.resnets\.(\d)", r"\1.block.\2", name)
    name = re.sub(r"(up\.\d)\.upsamplers\.0", r"\1.upsample", name)
    for pattern, replacement in VAE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def to_single_file(text_encoder: CLIPTextModel, unet: UNet2DConditionModel, vae: AutoencoderKL) -> State:
    """The three networks as one state dict of CompVis' Stable Diffusion 1.x."""
    attends = tuple("CrossAttn" in block for block in unet.config.up_block_types)
    layers, levels = unet.config.layers_per_block, len(vae.config.block_out_channels)
    state = {}
    for name, tensor in unet.state_dict().items():
        state[f"model.diffusion_model.{unet_key(name, layers, attends)}"] = tensor
    for name, tensor in vae.state_dict().items():
        is_linear = re.search(r"attentions\.0\.to_.*weight", name)
        state[f"first_stage_model.{vae_key(name, levels)}"] = tensor[:, :, None, None] if is_linear else tensor
    for name, tensor in text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    return state


def save(path: Path, state: State) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path
