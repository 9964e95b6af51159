"""The safety checker, a StableDiffusionSafetyChecker without the decision, which the runtime makes from the scores.

clip_input (batch, 3, 224, 224)  → special_scores (batch, 3), concept_scores (batch, 17)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from sd_runtime.tensor import Dim, TensorSpec
from torch import Tensor, nn

from ..signature import MAX_IMAGES, Signature
from ..source import Checkpoint
from .base import Configs, Network
from .loading import build, fill, state_dict

if TYPE_CHECKING:
    from ..verify.torch_reference import TorchReference

SPECIAL_CONCEPTS, CONCEPTS = 3, 17  # fixed in diffusers' code
VISION_PREFIX = re.compile(r"^(vision_model\.){1,2}")


class SafetyChecker(nn.Module):
    """StableDiffusionSafetyChecker's scores: CLIP pixels (B, 3, S, S) → (B, 3) and (B, 17).

    A score is the cosine between the picture and a concept, above the concept's threshold; the caller decides."""

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


def load_safety_checker(checkpoint: Checkpoint) -> Any:
    """The safety checker as a diffusers StableDiffusionSafetyChecker."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    def build_checker(config: dict[str, Any]) -> Any:
        return StableDiffusionSafetyChecker(CLIPConfig.from_dict(config))

    # Not built on the meta device: its position_ids are a buffer that no checkpoint fills.
    model = build(checkpoint, "safety_checker", build_checker, device="cpu")
    # Checkpoints wrap the vision transformer twice; transformers since 5.6 does so once.  Old files store position_ids.
    prefix = "vision_model.vision_model." if hasattr(model.vision_model, "vision_model") else "vision_model."
    state = {
        VISION_PREFIX.sub(prefix, name): tensor
        for name, tensor in state_dict(checkpoint, "safety_checker").items()
        if not name.endswith("embeddings.position_ids")
    }
    return fill(checkpoint, "safety_checker", model, state)


def image_size(configs: Configs) -> int:
    """Sides, in pixels, of the pictures that CLIP's image processor makes."""
    size: int = (configs["safety_checker"].get("vision_config") or {}).get("image_size", 224)
    return size


def safety_checker_signature(side: int) -> Signature:
    """Pictures of `side` × `side` pixels → one score a concept."""
    batch = Dim("batch", 1, 1, MAX_IMAGES)
    return Signature(
        inputs=(TensorSpec("clip_input", "float32", (batch, 3, side, side)),),
        outputs=(
            TensorSpec("special_scores", "float32", (batch, SPECIAL_CONCEPTS)),
            TensorSpec("concept_scores", "float32", (batch, CONCEPTS)),
        ),
    )


def _cosines(model: ir.Model) -> frozenset[str]:
    """Computed beyond the networks inside the module.  They stay float32, because their third digit decides."""
    own = (node for node in model.graph if "/" not in str(node.name))
    return frozenset(str(value.name) for node in own for value in node.outputs)


def _reference(reference: TorchReference) -> None:
    """The scores of the sample picture in CLIP's size, from the module that is traced."""
    side = image_size(reference.checkpoint.configs)
    reference.traced_cases("safety_checker", SAFETY_CHECKER, reference.square_picture(side))


SAFETY_CHECKER = Network(
    model=load_safety_checker,
    module=SafetyChecker,
    signature=lambda configs: safety_checker_signature(image_size(configs)),
    reference=_reference,
    float32=_cosines,
)
