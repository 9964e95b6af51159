"""The denoiser, a UNet2DConditionModel.

sample (batch, 4, h, w), timestep (batch,) or (1,), encoder_hidden_states (batch, sequence_length, D)
and, of a latent consistency model, timestep_cond (batch, G)                  → out_sample (batch, 4, h, w)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sd_runtime.tensor import Dim, TensorSpec
from torch import Tensor, nn

from ..signature import MAX_CHUNKS, MAX_IMAGES, TIMESTEPS, Signature, Sizes
from ..source import Checkpoint
from .base import Network
from .loading import build, fill, state_dict

if TYPE_CHECKING:
    from ..verify.torch_reference import TorchReference


class UNet(nn.Module):
    """UNet2DConditionModel: noisy latents (B, 4, h, w), timestep (1,), text (B, L, D) → model output (B, 4, h, w).

    A latent consistency model's also takes the guidance scale, embedded: timestep_cond (B, G)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.unet = model

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.unet(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]
        return output


def load_unet(checkpoint: Checkpoint) -> Any:
    """The denoising network as a diffusers UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    model = build(checkpoint, "unet", UNet2DConditionModel.from_config)
    return fill(checkpoint, "unet", model, state_dict(checkpoint, "unet"))


def unet_signature(sizes: Sizes) -> Signature:
    """A guided picture takes two rows of the batch.  `timestep` is a number for each row, so that pictures at different
    steps share an evaluation, or one for the whole batch; like the samplers' it may have a fraction."""
    batch = Dim("batch", 1, 2, 2 * MAX_IMAGES)
    latents = (batch, sizes.channels, *sizes.latent_axes())
    sequence = Dim("sequence_length", sizes.positions, sizes.positions, MAX_CHUNKS * sizes.positions)
    guidance = () if sizes.guidance is None else (TensorSpec("timestep_cond", "float32", (batch, sizes.guidance)),)
    return Signature(
        inputs=(
            TensorSpec("sample", "float32", latents),
            TensorSpec("timestep", "float32", (Dim(TIMESTEPS, 1, 2, 2 * MAX_IMAGES),)),
            TensorSpec("encoder_hidden_states", "float32", (batch, sequence, sizes.width)),
            *guidance,
        ),
        outputs=(TensorSpec("out_sample", "float32", latents),),
    )


def _reference(reference: TorchReference) -> None:
    """The UNet alone, on the sample picture's latents with ever less noise, for the negative prompt and the prompt."""
    shared = {"encoder_hidden_states": reference.hidden_states()}
    if reference.unet.config.time_cond_proj_dim is not None:
        shared["timestep_cond"] = reference.guidance_embedding(rows=2)
    for timestep in reference.probe.timesteps:
        noisy = reference.noisy_latents(timestep)
        own = {
            "sample": reference.put(f"unet.{timestep}.sample", noisy.repeat(2, 1, 1, 1)),
            "timestep": reference.put(f"unet.{timestep}.timestep", np.array([timestep], np.float32)),
        }
        arguments = {name: reference.tensor(tensor) for name, tensor in (own | shared).items()}
        arguments["timestep"] = torch.tensor(timestep)  # as a pipeline passes it

        def call(arguments: dict[str, Tensor] = arguments) -> Tensor:
            output: Tensor = reference.unet(**arguments)[0]
            return output

        expected = reference.put(f"unet.{timestep}.out_sample", reference.timed("unet", call))
        reference.case("unet", f"timestep {timestep}", own | shared, "out_sample", expected)


UNET = Network(
    model=load_unet,
    module=UNet,
    signature=lambda configs: unet_signature(Sizes.of(configs)),
    reference=_reference,
    root="unet",
)
