"""The autoencoder, an AutoencoderKL (Rombach et al. 2022): two networks of a bundle over one part of a checkpoint.

    vae_decoder    latent_sample (batch, 4, h, w), unscaled      → sample (batch, 3, 8 h, 8 w) in about [-1, 1]
    vae_encoder    sample (batch, 3, H, W) in [-1, 1]            → latent_parameters (batch, 8, H/8, W/8)

Both are measured on probes before they become float16: they are the networks that outgrow it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sd_runtime.tensor import Array, Dim, TensorSpec
from torch import Tensor, nn

from ..signature import MAX_IMAGES, Signature, Sizes
from ..source import Checkpoint
from .base import Configs, Network
from .loading import build, fill, state_dict
from .probes import latent_probes, picture_probes

if TYPE_CHECKING:
    from ..verify.torch_reference import TorchReference

SCALING_FACTOR = 0.18215  # diffusers' default
# The attention of VAEs that were saved before diffusers 0.17.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION_KEY = re.compile(r"(.*mid_block\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")


class VAEDecoder(nn.Module):
    """AutoencoderKL's decoder: unscaled latents (B, 4, h, w) → RGB (B, 3, 8 h, 8 w), not clipped."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.post_quant_conv = model.post_quant_conv if model.post_quant_conv is not None else nn.Identity()
        self.decoder = model.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        sample: Tensor = self.decoder(self.post_quant_conv(latent_sample))
        return sample


class VAEEncoder(nn.Module):
    """AutoencoderKL's encoder: RGB (B, 3, H, W) → mean and log variance (B, 8, H/8, W/8); the caller draws a sample."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.quant_conv = model.quant_conv if model.quant_conv is not None else nn.Identity()

    def forward(self, sample: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(sample))
        return moments


def load_vae(checkpoint: Checkpoint) -> Any:
    """The autoencoder as a diffusers AutoencoderKL."""
    from diffusers import AutoencoderKL

    model = build(checkpoint, "vae", AutoencoderKL.from_config)
    state = {_modern_attention(name): tensor for name, tensor in state_dict(checkpoint, "vae").items()}
    return fill(checkpoint, "vae", model, state)


def _modern_attention(name: str) -> str:
    match = OLD_ATTENTION_KEY.fullmatch(name)
    return match[1] + OLD_ATTENTION[match[2]] + match[3] if match else name


def vae_decoder_signature(sizes: Sizes) -> Signature:
    """Latents already divided by the scaling factor → RGB."""
    batch, cells = Dim("batch", 1, 1, MAX_IMAGES), sizes.latent_axes()
    height, width = (f"{axis.symbol} * {sizes.pixels}" for axis in cells)
    return Signature(
        inputs=(TensorSpec("latent_sample", "float32", (batch, sizes.channels, *cells)),),
        outputs=(TensorSpec("sample", "float32", (batch, 3, *sizes.rgb_axes((height, width)))),),
    )


def vae_encoder_signature(sizes: Sizes) -> Signature:
    """RGB, its sides multiples of a cell → mean and log variance of the latents, stacked; not yet scaled."""
    batch, rgb = Dim("batch", 1, 1, MAX_IMAGES), sizes.rgb_axes(("height", "width"))
    cells = [
        Dim(f"{side.symbol} / {sizes.pixels}", axis.min, axis.opt, axis.max)
        for side, axis in zip(rgb, sizes.latent_axes(), strict=True)
    ]
    return Signature(
        inputs=(TensorSpec("sample", "float32", (batch, 3, *rgb)),),
        outputs=(TensorSpec("latent_parameters", "float32", (batch, 2 * sizes.channels, *cells)),),
    )


def _latent_probes(configs: Configs) -> list[Array]:
    return latent_probes(Sizes.of(configs).channels, configs["vae"].get("scaling_factor", SCALING_FACTOR))


def _decoder_reference(reference: TorchReference) -> None:
    """The sample picture's latents, decoded."""
    latents = reference.put("latent_sample", reference.posterior_mean())
    decoded = reference.timed("vae_decoder", lambda: reference.vae.decode(reference.tensor(latents)).sample)
    expected = reference.put("decoded", decoded)
    reference.case("vae_decoder", "sample picture", {"latent_sample": latents}, "sample", expected)


def _encoder_reference(reference: TorchReference) -> None:
    """The sample picture, encoded."""
    expected, feeds = reference.posterior(), {"sample": reference.sample_picture()}
    reference.case("vae_encoder", "sample picture", feeds, "latent_parameters", expected)


DECODER = Network(
    model=load_vae,
    module=VAEDecoder,
    signature=lambda configs: vae_decoder_signature(Sizes.of(configs)),
    reference=_decoder_reference,
    probes=_latent_probes,
)
ENCODER = Network(
    model=load_vae,
    module=VAEEncoder,
    signature=lambda configs: vae_encoder_signature(Sizes.of(configs)),
    reference=_encoder_reference,
    probes=lambda configs: picture_probes(Sizes.of(configs).pixels),
)
