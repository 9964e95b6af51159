"""A single .safetensors with the keys of CompVis' Stable Diffusion; its configs are inferred without a download.

The file holds three state dicts under prefixes and no config.  Widths, depths and the places of attention are read from
the tensors' shapes; all other fields are Stable Diffusion 1.5's or, where the text encoder is OpenCLIP's, 2.x's.  The
keys are renamed by diffusers' own conversion functions, which are pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sd_runtime.errors import ExportError, one_line

from .checkpoint import Config
from .families import sd1, sd2
from .families.check import check_keys
from .prediction import MARKS, Prediction

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
UNTOLD = Prediction(None)

PREFIXES = {
    "text_encoder": "cond_stage_model.transformer.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}
OPEN_CLIP = "cond_stage_model.model."  # the text encoder of 2.x, in OpenCLIP's naming
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # EMA and loss weights are left where they are
CLIP_HEAD_SIZE = 64  # of every CLIP text model: heads = width / 64

# What a file may hold beside the three networks, as regular expressions; what else it holds would change the pictures,
# or is of another model, and is refused by name, as in a folder.
EXTRA = (
    r"model_ema\..*",  # averages of the UNet's weights, to train on
    r"(first_stage_model\.)?(loss|model_ema)\..*",  # the same of the VAE, and the critics that it was trained with
    # the training schedule, which follows from its betas
    r"betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|denoiser\.(log_)?sigmas",
    r"(cond_stage_model\.)?(transformer\.)?(logit_scale|text_projection(\.weight)?)",  # CLIP's comparison with pictures
    r"cond_stage_model\.transformer\.(vision_model|visual_projection)\..*",  # and its other half
    r"cond_stage_model\.model\.(attn_mask|logit_scale|text_projection)",  # the same of OpenCLIP
    r"global_step|epoch|iteration",  # how long it was trained
    "|".join(MARKS),  # which `prediction` reads
)


def is_open_clip(shapes: Iterable[str]) -> bool:
    """Whether a file's text encoder is OpenCLIP's, so that it is Stable Diffusion 2.x."""
    return any(name.startswith(OPEN_CLIP) for name in shapes)


def prefixes(shapes: Iterable[str]) -> dict[str, str]:
    """Network → the start of its keys."""
    return PREFIXES | ({"text_encoder": OPEN_CLIP} if is_open_clip(shapes) else {})


def model_index(configs: Mapping[str, Config]) -> Config:
    """What model_index.json says of a file with these configs."""
    return sd1.MODEL_INDEX | {"scheduler": ["diffusers", configs["scheduler"]["_class_name"]]}


def infer_configs(
    model: str, shapes: Shapes, prediction: Prediction = UNTOLD, *, own_vae: bool = True
) -> dict[str, Config]:
    """The configs of text_encoder, unet, vae and scheduler from the tensors' names and shapes; ExportError if the file
    is not a complete Stable Diffusion checkpoint, or more than that, or if it is 2.x and nothing tells what its UNet
    predicts.  Without `own_vae` a VAE may be missing, and its config is then Stable Diffusion 1.5's."""
    starts, second = prefixes(shapes), is_open_clip(shapes)
    parts = {part: _strip(shapes, prefix) for part, prefix in starts.items()}
    if missing := [part for part, tensors in parts.items() if not tensors and (own_vae or part != "vae")]:
        check_keys(model, shapes)
        raise ExportError(
            f"model '{one_line(model)}' has no {', '.join(missing)} under Stable Diffusion 1.x keys",
            accepted="; ".join(f"{prefix}*" for prefix in starts.values()),
            remedy="add one from elsewhere with --vae" if missing == ["vae"] else None,
        )
    others = [name for name in shapes if not name.startswith(tuple(starts.values()))]
    check_extra(model, others)
    if second and prediction.type is None:
        raise ExportError(
            f"model '{one_line(model)}' is Stable Diffusion 2.x as a single file, which does not tell what it predicts",
            accepted="epsilon (the models of 512 pixels) or v_prediction (those of 768)",
            remedy="say it with --prediction-type",
        )
    velocity = second and prediction.type == "v_prediction"
    try:
        unet = _unet_config(parts["unet"], sd2.UNET if second else sd1.UNET)
        if second:
            unet |= {"attention_head_dim": [width // sd2.HEAD_SIZE or 1 for width in unet["block_out_channels"]]}
        return {
            "text_encoder": _open_clip_config(parts["text_encoder"])
            if second
            else _text_encoder_config(parts["text_encoder"]),
            "unet": unet | (sd2.VELOCITY_UNET if velocity else {}),
            "vae": _vae_config(parts["vae"]) if parts["vae"] else sd1.VAE,
            "scheduler": (sd2.VELOCITY_SCHEDULER if velocity else sd1.SCHEDULER) | prediction.fields(),
        }
    except (LookupError, ValueError) as error:
        check_keys(model, shapes)
        reason = one_line(str(error))
        raise ExportError(
            f"model '{one_line(model)}' does not have the tensors of Stable Diffusion 1.x ({reason})"
        ) from error


def infer_vae(model: str, shapes: Shapes) -> tuple[Config, str]:
    """The config of a VAE from the tensors of its file, or of a whole checkpoint, and what its keys start with."""
    prefix = PREFIXES["vae"] if any(name.startswith(PREFIXES["vae"]) for name in shapes) else ""
    try:
        config = _vae_config(_strip(shapes, prefix))
    except LookupError as error:
        what = f"'{one_line(model)}' does not have the tensors of a Stable Diffusion 1.x VAE ({one_line(str(error))})"
        raise ExportError(what, remedy="give a folder in diffusers layout") from error
    check_extra(model, (name for name in shapes if not prefix and not name.startswith(VAE_PARTS)))
    return config, prefix


def check_extra(model: str, names: Iterable[str]) -> None:
    """Refuse the tensors `names`, but those that do not matter to a picture."""
    unexpected = [name for name in names if not any(re.fullmatch(pattern, name) for pattern in EXTRA)]
    if unexpected:
        check_keys(model, unexpected)
        more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
        raise ExportError(
            f"model '{one_line(model)}' holds tensors that are not Stable Diffusion's: "
            f"{one_line(', '.join(unexpected[:3]), 300)}{more}",
            remedy="remove them in a copy if they belong to nothing that you use",
        )


def _strip(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _text_encoder_config(shapes: Shapes) -> Config:
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    vocab_size, width = shapes["embeddings.token_embedding.weight"]
    if vocab_size != sd1.TEXT_ENCODER["vocab_size"]:
        raise ValueError(f"a vocabulary of {vocab_size} tokens instead of CLIP's")
    return sd1.TEXT_ENCODER | {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "num_attention_heads": max(1, width // CLIP_HEAD_SIZE),
        "num_hidden_layers": _count(shapes, "encoder.layers.{}.layer_norm1.weight"),
        "projection_dim": width,
    }


def _open_clip_config(shapes: Shapes) -> dict[str, Any]:
    """Stable Diffusion 2.x attends to what OpenCLIP's last layer but one makes."""
    vocab_size, width = shapes["token_embedding.weight"]
    if vocab_size != sd1.TEXT_ENCODER["vocab_size"]:
        raise ValueError(f"a vocabulary of {vocab_size} tokens instead of CLIP's")
    return sd2.TEXT_ENCODER | {
        "hidden_size": width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "max_position_embeddings": shapes["positional_embedding"][0],
        "num_attention_heads": max(1, width // sd2.HEAD_SIZE),
        "num_hidden_layers": _count(shapes, "transformer.resblocks.{}.ln_1.weight") - 1,
    }


def _unet_config(shapes: Shapes, published: Config) -> dict[str, Any]:
    """input_blocks: 0 is the first convolution; then, per level, `layers` residual blocks and a downsampling `op`."""
    blocks = _count(shapes, "input_blocks.{}.0", prefix=True)
    layers = next((i for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in shapes), blocks) - 1
    firsts = range(1, blocks, layers + 1)
    attends = [f"input_blocks.{i}.1.proj_in.weight" in shapes for i in firsts]
    context = {size[1] for name, size in shapes.items() if name.endswith(".attn2.to_k.weight")}
    return dict(published) | {
        "block_out_channels": [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in firsts],
        "cross_attention_dim": max(context),
        "down_block_types": ["CrossAttnDownBlock2D" if attended else "DownBlock2D" for attended in attends],
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "layers_per_block": layers,
        "out_channels": shapes["out.2.weight"][0],
        "up_block_types": ["CrossAttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(attends)],
    }


def _vae_config(shapes: Shapes) -> Config:
    levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    return sd1.VAE | {
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": _count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _count(shapes: Shapes, pattern: str, *, prefix: bool = False) -> int:
    """How many of pattern.format(0), pattern.format(1), … exist, as names or as starts of names; at least one."""

    def exists(name: str) -> bool:
        return any(n.startswith(name + ".") for n in shapes) if prefix else name in shapes

    number = next(i for i in count() if not exists(pattern.format(i)))
    if number == 0:
        raise KeyError(pattern.format(0))
    return number


def to_diffusers(model: str, network: str, state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """One network's tensors, renamed from CompVis' keys to diffusers' and transformers'.  ExportError names tensors
    that the conversion, which is diffusers' own, would drop without a word."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    converted: dict[str, Tensor]
    if network == "unet":
        converted = convert_ldm_unet_checkpoint(state, config)
    elif network == "vae":
        parts = tuple(PREFIXES["vae"] + part for part in VAE_PARTS) + VAE_PARTS
        kept = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
        converted = convert_ldm_vae_checkpoint(kept, config)
    elif is_open_clip(state):
        return _from_open_clip(model, state, config)
    else:
        converted = {name.removeprefix(PREFIXES[network]): tensor for name, tensor in state.items()}
    used = {tensor.data_ptr() for tensor in converted.values()}  # conversion renames and reshapes, and copies nothing
    check_extra(model, (name for name, tensor in state.items() if tensor.data_ptr() not in used))
    return converted


def _from_open_clip(model: str, state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """OpenCLIP's tensors by transformers' names, but for the last layer and what compares texts with pictures."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    unused = (f"{OPEN_CLIP}transformer.resblocks.{config['num_hidden_layers']}.", f"{OPEN_CLIP}text_projection")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    parts = ("transformer.resblocks.", "token_embedding.", "positional_embedding", "ln_final.")
    known = tuple(OPEN_CLIP + part for part in parts)
    check_extra(model, (name for name in kept if not name.startswith(known)))
    width = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    converted: dict[str, Tensor] = convert_open_clip_checkpoint(width, kept, OPEN_CLIP)
    return {name: tensor for name, tensor in converted.items() if name != "text_projection.weight"}
