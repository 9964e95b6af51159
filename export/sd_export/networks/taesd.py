"""The fast decoder, of an AutoencoderTiny (TAESD, github.com/madebyollin/taesd).

latent_sample (batch, 4, h, w) as the UNet leaves them  → sample (batch, 3, 8 h, 8 w) in about [-1, 1]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..signature import Sizes
from ..source import Checkpoint
from .base import Network
from .loading import build, fill, state_dict
from .vae import vae_decoder_signature

if TYPE_CHECKING:
    from ..verify.torch_reference import TorchReference


class TAESDDecoder(nn.Module):
    """AutoencoderTiny's decoder: latents (B, 4, h, w) as the UNet leaves them → RGB (B, 3, 8 h, 8 w), not clipped."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.decoder
        self.scaling_factor = float(model.config.scaling_factor)

    def forward(self, latent_sample: Tensor) -> Tensor:
        unscaled = latent_sample if self.scaling_factor == 1.0 else latent_sample / self.scaling_factor
        sample: Tensor = self.decoder(unscaled)
        return sample


def load_taesd(checkpoint: Checkpoint) -> Any:
    """The fast decoder as a diffusers AutoencoderTiny."""
    from diffusers import AutoencoderTiny

    def build_tiny(config: dict[str, Any]) -> Any:
        config.pop("block_out_channels", None)  # which diffusers writes and, reading it back, remarks upon
        return AutoencoderTiny.from_config(config)

    model = build(checkpoint, "taesd", build_tiny)
    return fill(checkpoint, "taesd", model, state_dict(checkpoint, "taesd"))


def _reference(reference: TorchReference) -> None:
    """The sample picture's scaled latents, decoded by the module that is traced."""
    reference.traced_cases("taesd", TAESD, reference.clean_latents())


TAESD = Network(
    model=load_taesd,
    module=TAESDDecoder,
    signature=lambda configs: vae_decoder_signature(Sizes.of(configs)),
    reference=_reference,
)
