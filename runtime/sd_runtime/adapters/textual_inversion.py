"""Textual inversion: words whose meaning is one or more learnt vectors, put where the token embeddings go.

Gal et al., "An Image is Worth One Word", 2022 (arXiv 2208.01618).  `prompt.token_embeddings` puts them there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..bundle.safetensors_file import open_safetensors
from ..errors import UsageError
from ..images.files import why_unreadable
from ..tensor import Array, all_finite

AUTOMATIC1111_KEY = "emb_params"  # its files do not say the word; it is the file's name


def load_textual_inversion(path: Path, token: str | None = None) -> tuple[str, Array]:
    """The word and its vectors (k, D) float32 in a .safetensors of diffusers or AUTOMATIC1111.

    `token` overrides the word.  UsageError: no such file, or not of these forms; BundleError: damaged or unreadable."""
    if path.suffix != ".safetensors":
        raise UsageError(
            "textual inversion",
            got=str(path),
            accepted="a .safetensors file",
            remedy="convert .pt and .bin files first: loading them can run code",
        )
    if reason := why_unreadable(path):
        raise UsageError("textual inversion", got=str(path), accepted="a .safetensors file", remedy=reason)
    tensors = open_safetensors(path)
    if len(tensors) != 1:
        raise UsageError(
            f"{path.name}: tensors",
            got=", ".join(tensors),
            accepted=f"one, {AUTOMATIC1111_KEY} or a word",
            remedy="this one is for SDXL" if "clip_g" in tensors else None,
        )
    ((name, vectors),) = tensors.items()
    if vectors.dtype.kind != "f" or vectors.ndim not in (1, 2) or 0 in vectors.shape:
        got = f"{vectors.dtype}{vectors.shape}"
        raise UsageError(f"{path.name}: {name}", got=got, accepted="float (vectors, width) or (width,)")
    vectors = np.atleast_2d(vectors).astype(np.float32)
    if not all_finite(vectors):
        raise UsageError(f"{path.name}: {name}", got="NaN or infinity", accepted="finite numbers")
    return token or (path.stem if name == AUTOMATIC1111_KEY else name), vectors
