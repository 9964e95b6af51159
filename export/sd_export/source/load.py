"""The networks of a checkpoint as torch modules: float32, evaluation mode, no gradients.

A model is built without storage and takes over the file's memory-mapped tensors, so float32 weights cost no private
memory.  Load one network at a time and drop it before the next.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sd_runtime.errors import ExportError, one_line

from . import single_file
from .checkpoint import SAFETY_CHECKER, TAESD, Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

# The attention of VAEs that were saved before diffusers 0.17.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION_KEY = re.compile(r"(.*mid_block\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")
VISION_PREFIX = re.compile(r"^(vision_model\.){1,2}")


def load_text_encoder(checkpoint: Checkpoint) -> Any:
    """The text encoder as a transformers CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    # Not built on the meta device: its position_ids are a buffer that no checkpoint fills.
    model = _build(checkpoint, "text_encoder", lambda c: CLIPTextModel(CLIPTextConfig.from_dict(c)), device="cpu")
    # Checkpoints say text_model.encoder…, transformers since 5.6 says encoder…; old files also store position_ids.
    prefix = "text_model." if hasattr(model, "text_model") else ""
    state = _state_dict(checkpoint, "text_encoder")
    state = {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    state.pop(f"{prefix}embeddings.position_ids", None)
    return _fill(checkpoint, "text_encoder", model, state)


def load_unet(checkpoint: Checkpoint) -> Any:
    """The denoising network as a diffusers UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    model = _build(checkpoint, "unet", UNet2DConditionModel.from_config)
    return _fill(checkpoint, "unet", model, _state_dict(checkpoint, "unet"))


def load_vae(checkpoint: Checkpoint) -> Any:
    """The autoencoder as a diffusers AutoencoderKL."""
    from diffusers import AutoencoderKL

    model = _build(checkpoint, "vae", AutoencoderKL.from_config)
    state = {_modern_attention(name): tensor for name, tensor in _state_dict(checkpoint, "vae").items()}
    return _fill(checkpoint, "vae", model, state)


def load_taesd(checkpoint: Checkpoint) -> Any:
    """The fast decoder as a diffusers AutoencoderTiny."""
    from diffusers import AutoencoderTiny

    def build(config: dict[str, Any]) -> Any:
        config.pop("block_out_channels", None)  # which diffusers writes and, reading it back, remarks upon
        return AutoencoderTiny.from_config(config)

    model = _build(checkpoint, TAESD, build)
    return _fill(checkpoint, TAESD, model, _state_dict(checkpoint, TAESD))


def load_safety_checker(checkpoint: Checkpoint) -> Any:
    """The safety checker as a diffusers StableDiffusionSafetyChecker."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    def build(config: dict[str, Any]) -> Any:
        return StableDiffusionSafetyChecker(CLIPConfig.from_dict(config))

    model = _build(checkpoint, SAFETY_CHECKER, build, device="cpu")  # position_ids, as above
    # Checkpoints wrap the vision transformer twice; transformers since 5.6 does so once.  Old files store position_ids.
    prefix = "vision_model.vision_model." if hasattr(model.vision_model, "vision_model") else "vision_model."
    state = {
        VISION_PREFIX.sub(prefix, name): tensor
        for name, tensor in _state_dict(checkpoint, SAFETY_CHECKER).items()
        if not name.endswith("embeddings.position_ids")
    }
    return _fill(checkpoint, SAFETY_CHECKER, model, state)


def _modern_attention(name: str) -> str:
    match = OLD_ATTENTION_KEY.fullmatch(name)
    return match[1] + OLD_ATTENTION[match[2]] + match[3] if match else name


def _build(checkpoint: Checkpoint, network: str, make: Any, device: str = "meta") -> Any:
    """make(config) on `device`; a config that the library rejects is an ExportError, whatever it raises."""
    import torch

    try:
        with torch.device(device):
            return make(dict(checkpoint.configs[network]))
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 160)
        raise ExportError(f"model '{checkpoint.id}': no {network} can be built from its config ({reason})") from error


def _state_dict(checkpoint: Checkpoint, network: str) -> dict[str, Tensor]:
    """The network's tensors in diffusers' naming, memory-mapped, in the file's dtype."""
    from safetensors import safe_open

    prefix = checkpoint.prefixes.get(network)
    with safe_open(str(checkpoint.weights[network]), framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix or "")}  # noqa: SIM118
    return state if prefix is None else single_file.to_diffusers(network, state, checkpoint.configs[network])


def _fill(checkpoint: Checkpoint, network: str, model: Any, state: dict[str, Tensor]) -> Any:
    """`model` with exactly the tensors of `state`; ExportError names those that are missing, extra or misshapen."""
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, its config says {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ExportError(
            f"{checkpoint.weights[network]} does not hold the {network} that its config describes: "
            f"{one_line('; '.join(problems[:3]), 300)}{more}"
        )
    model.load_state_dict(state, assign=True)
    return model.float().eval().requires_grad_(False)
