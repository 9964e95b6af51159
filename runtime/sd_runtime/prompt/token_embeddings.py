"""Words beside the checkpoint's own: vectors that are put where the token embeddings go.

The text encoder's graph then starts after its look-up of token embeddings (form "embeds"), and the look-up is done
here, in a table that the new vectors follow:

    row 0 … V-1   the checkpoint's own embeddings
    row V …       the vectors of the first word, then those of the second, …
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import UsageError
from ..fields import check_text
from ..tensor import Array
from .chunks import ROOM
from .normalization import normalize
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenEmbeddings:
    """What the text encoder looks up: `table` (V, D), the checkpoint's own, and the learnt `tokens`, word → (k, D).

    UsageError: a vector's width is not D, a word has more vectors than a chunk holds, or two words are spelt alike."""

    table: Array
    tokens: Mapping[str, Array]

    def __post_init__(self) -> None:
        width = self.table.shape[1]
        for word, vectors in self.tokens.items():
            check_text(word, "textual inversion: word")
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
