"""CLIP's text encoder (Radford et al. 2021).

plain   input_ids (batch, 77) int64              → last_hidden_state (batch, 77, D), pooler_output (batch, D)
embeds  inputs_embeds (batch, 77, D) float32     → last_hidden_state (batch, 77, D)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from sd_runtime.tensor import Dim, TensorSpec
from torch import Tensor, nn

from ..graphs.forms import text_embeds
from ..signature import MAX_PROMPTS, Signature, Sizes
from ..source import Checkpoint
from .base import Configs, Network
from .loading import build, fill, state_dict

if TYPE_CHECKING:
    from ..verify.torch_reference import TorchReference

# What files hold beside the text encoder, and a picture from text does not need: the positions 0, 1, 2 … (until
# transformers 4.31), and CLIP's other half, with which texts are compared with pictures, where all of CLIP was saved.
UNUSED = re.compile(
    r"(text_model\.)?embeddings\.position_ids|text_projection(\.weight)?|logit_scale|(vision_model|visual_projection)\..*"
)


class TextEncoder(nn.Module):
    """CLIPTextModel: token ids → (last_hidden_state after the final norm, pooler_output at the first end token)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        # transformers ≤ 4 wraps the transformer in an attribute of this name, 5 is it; checkpoints always have it.
        self.text_model = getattr(model, "text_model", model)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.text_model(input_ids)
        return output.last_hidden_state, output.pooler_output


def load_text_encoder(checkpoint: Checkpoint) -> Any:
    """The text encoder as a transformers CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    # Not built on the meta device: its position_ids are a buffer that no checkpoint fills.
    model = build(checkpoint, "text_encoder", lambda c: CLIPTextModel(CLIPTextConfig.from_dict(c)), device="cpu")
    # Checkpoints say text_model.encoder…, transformers since 5.6 says encoder….
    prefix = "text_model." if hasattr(model, "text_model") else ""
    state = {
        prefix + name.removeprefix("text_model."): tensor
        for name, tensor in state_dict(checkpoint, "text_encoder").items()
        if not UNUSED.fullmatch(name)
    }
    return fill(checkpoint, "text_encoder", model, state)


def text_encoder_signature(sizes: Sizes) -> Signature:
    """From token ids on."""
    batch = Dim("batch", 1, 2, MAX_PROMPTS)
    return Signature(
        inputs=(TensorSpec("input_ids", "int64", (batch, sizes.positions)),),
        outputs=(
            TensorSpec("last_hidden_state", "float32", (batch, sizes.positions, sizes.width)),
            TensorSpec("pooler_output", "float32", (batch, sizes.width)),
        ),
    )


def text_embeds_signature(sizes: Sizes) -> Signature:
    """From token embeddings on (before positions are added), for textual inversion and mixing."""
    hidden = (Dim("batch", 1, 2, MAX_PROMPTS), sizes.positions, sizes.width)
    return Signature(
        inputs=(TensorSpec("inputs_embeds", "float32", hidden),),
        outputs=(TensorSpec("last_hidden_state", "float32", hidden),),
    )


def _embeds(plain: Path, configs: Configs) -> dict[str, tuple[ir.Model, Signature]]:
    signature = text_embeds_signature(Sizes.of(configs))
    return {"embeds": (text_embeds(plain, signature), signature)}


def _reference(reference: TorchReference) -> None:
    """The negative prompt's and the prompt's hidden states."""
    feeds = {"input_ids": reference.prompt_ids()}
    reference.case("text_encoder", "hidden states", feeds, "last_hidden_state", reference.hidden_states())


TEXT_ENCODER = Network(
    model=load_text_encoder,
    module=TextEncoder,
    signature=lambda configs: text_encoder_signature(Sizes.of(configs)),
    reference=_reference,
    extra_graphs=_embeds,
)
