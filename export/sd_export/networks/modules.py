"""The networks as they are traced: tensors in, tensors out, nothing that the picture does not need.

Submodules sit under the names that they have in a checkpoint, so that the exported weights keep the checkpoint's keys.
The parameters' names at the edge are those of `signature`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """CLIPTextModel: token ids → (last_hidden_state after the final norm, pooler_output at the first end token)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        # transformers ≤ 4 wraps the transformer in an attribute of this name, 5 is it; checkpoints always have it.
        self.text_model = getattr(model, "text_model", model)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.text_model(input_ids)
        return output.last_hidden_state, output.pooler_output


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
    """AutoencoderKL's encoder: RGB (B, 3, H, W) → mean and log variance (B, 8, H/8, W/8); who calls draws."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.quant_conv = model.quant_conv if model.quant_conv is not None else nn.Identity()

    def forward(self, sample: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(sample))
        return moments


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


class SafetyChecker(nn.Module):
    """StableDiffusionSafetyChecker without its verdict: CLIP pixels (B, 3, S, S) → scores (B, 3) and (B, 17).

    A score is the cosine between the picture and a concept, above the concept's threshold; who calls decides."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection
        self.special_care_embeds = model.special_care_embeds
        self.special_care_embeds_weights = model.special_care_embeds_weights
        self.concept_embeds = model.concept_embeds
        self.concept_embeds_weights = model.concept_embeds_weights

    def forward(self, clip_input: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.vision_model(clip_input).pooler_output  # (B, V)
        image = unit(self.visual_projection(pooled))  # (B, P)
        special = image @ unit(self.special_care_embeds).T - self.special_care_embeds_weights
        concept = image @ unit(self.concept_embeds).T - self.concept_embeds_weights
        return special, concept


def unit(vectors: Tensor) -> Tensor:
    """(N, P) vectors, each of length 1; ReduceL2 would take its axes in another way before opset 18."""
    return vectors / (vectors * vectors).sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)


def freeze(module: nn.Module) -> None:
    """Put `module` into float32 and evaluation mode, without gradients."""
    module.eval().to(torch.float32).requires_grad_(False)
