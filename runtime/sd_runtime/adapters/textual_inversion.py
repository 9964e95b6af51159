"""Textual inversion: words whose meaning is one or more learnt vectors, put where the token embeddings go.

Gal et al., "An Image is Worth One Word", 2022 (arXiv 2208.01618).  The text encoder's graph then starts after its
look-up of token embeddings (form "embeds"), and the look-up is done here, in a table that the new vectors follow:

    row 0 … V-1   the checkpoint's own embeddings
    row V …       the vectors of the first word, then those of the second, …
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..bundle.safetensors_file import open_safetensors
from ..errors import UsageError, one_line
from ..prompt.chunks import ROOM
from ..prompt.normalization import normalize
from ..prompt.tokenizer import Tokenizer
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
    _check_is_file(path)
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


def _check_is_file(path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError("textual inversion", got=str(path), accepted="a .safetensors file, not a folder or device")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        what = f"textual inversion: cannot read '{one_line(str(path))}': {reason}"
        remedy = "check its name, and that you may read its folder"
        raise UsageError(what, remedy=remedy) from error


@dataclass(frozen=True)
class TokenEmbeddings:
    """What the text encoder looks up: `table` (V, D), the checkpoint's own, and the learnt `tokens`, word → (k, D).

    UsageError: a vector's width is not D, a word has more vectors than a chunk holds, or two words are spelt alike."""

    table: Array
    tokens: Mapping[str, Array]

    def __post_init__(self) -> None:
        width = self.table.shape[1]
        for word, vectors in self.tokens.items():
            if vectors.ndim != 2 or vectors.shape[1] != width or not 1 <= len(vectors) <= ROOM:
                accepted = f"(1..{ROOM}, {width}), as this model's embeddings"
                raise UsageError(f"textual inversion {word!r}", got=vectors.shape, accepted=accepted)
            if not normalize(word).strip():
                raise UsageError("textual inversion: word", got=word, accepted="text that is not blank")
        if len({normalize(word) for word in self.tokens}) < len(self.tokens):
            raise UsageError(
                "textual inversions", got=", ".join(self.tokens), accepted="words that differ, ignoring case"
            )

    @cached_property
    def ids(self) -> dict[str, int]:
        """Word → the row of its first vector."""
        counts = [len(vectors) for vectors in self.tokens.values()]
        rows = np.cumsum([len(self.table), *counts]).tolist()
        return dict(zip(self.tokens, rows[:-1], strict=True))

    @cached_property
    def vectors(self) -> dict[int, int]:
        """Row of a word's first vector → how many there are."""
        return {self.ids[word]: len(vectors) for word, vectors in self.tokens.items()}

    def extend(self, tokenizer: Tokenizer) -> Tokenizer:
        """`tokenizer` that knows the words, as tokens of the ids above."""
        return tokenizer.with_words(self.ids)

    def look_up(self, ids: Array) -> Array:
        """(n, 77) int64 rows → (n, 77, D) float32, the text encoder's `inputs_embeds`."""
        known = len(self.table)
        embeddings: Array = self.table[np.minimum(ids, known - 1)].astype(np.float32)
        if self.tokens:
            learnt = np.concatenate(list(self.tokens.values()))
            embeddings[ids >= known] = learnt[ids[ids >= known] - known]
        return embeddings
