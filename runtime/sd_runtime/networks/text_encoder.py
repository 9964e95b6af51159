"""The text encoder: CLIP's transformer, a chunk of 77 tokens a row.

plain    input_ids (n, 77) int64                  → last_hidden_state (n, 77, D) float32
embeds   inputs_embeds (n, 77, D) float32         → the same, for words that the checkpoint does not have
"""

from __future__ import annotations

import numpy as np

from ..bundle.schema import parse_json
from ..engines.protocol import Engine
from ..errors import BundleError
from ..tensor import Array, Dim

CLIP_VOCABULARY = 49408  # tokens, where a config does not say
CONFIG = "text_encoder/config.json"
TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"  # (V, D), its look-up table among its weights


def vocabulary_size(config: bytes) -> int:
    """V, how many tokens the text encoder has embeddings for, from its config.json."""
    value = parse_json(config, CONFIG)
    size = value.get("vocab_size", CLIP_VOCABULARY) if isinstance(value, dict) else None
    if type(size) is not int or size < 1:
        raise BundleError(f"{CONFIG}: vocab_size", got=value if size is None else size, accepted="whole numbers from 1")
    return size


def last_hidden_state(text_encoder: Engine, rows: Array) -> Array:
    """Run the text encoder on its one input, as many rows at a time as it takes."""
    (spec,) = text_encoder.inputs
    batch = spec.shape[0].max if isinstance(spec.shape[0], Dim) else spec.shape[0]
    parts = [
        text_encoder.run({spec.name: rows[i : i + batch]})["last_hidden_state"] for i in range(0, len(rows), batch)
    ]
    return np.concatenate(parts)
