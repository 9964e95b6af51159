"""Prompts → encoder_hidden_states, what the UNet's cross-attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engines.protocol import Engine
from ..errors import EXPORT_IN_FP32, NumericalError, UsageError
from ..fields import check_text
from ..networks.text_encoder import last_hidden_state
from ..tensor import Array, all_finite
from .chunks import LENGTH, NO_VECTORS, Chunk, TokenizedPrompt, empty_chunk, tokenize_prompt
from .foreign import refuse_instructions
from .token_embeddings import TokenEmbeddings
from .tokenizer import Tokenizer
from .weights import parse_weights

MAX_CHARACTERS = 100_000  # far beyond what any network takes; bounds the time that a refusal takes


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts, all padded to the same number of chunks.

    positive                        (P, 77·chunks, D) float32, one row a prompt
    negative                        the same for the negative prompts, None without guidance
    chunks                          per prompt how many of them are its own or its negative prompt's
    truncated, negative_truncated   per prompt the text that `truncate` dropped, "" where none
    """

    positive: Array
    negative: Array | None
    chunks: tuple[int, ...]
    truncated: tuple[str, ...]
    negative_truncated: tuple[str, ...] = ()

    def rows(self, prompts: Sequence[int]) -> Array:
        """(B, 77·chunks, D) for a batch whose picture i shows prompts[i], or (2B, …), the negative ones first.

        With no more chunks than these prompts need, so that a picture does not depend on prompts of other batches."""
        length = LENGTH * max(self.chunks[prompt] for prompt in prompts)
        positive = self.positive[list(prompts), :length]
        return positive if self.negative is None else np.concatenate([self.negative[list(prompts), :length], positive])


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts, and as many negative prompts or None, ready to be encoded: see `tokenize_prompts`."""

    positive: tuple[TokenizedPrompt, ...]
    negative: tuple[TokenizedPrompt, ...] | None


def tokenize_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    weighting: bool = True,
    truncate: bool = False,
    embeddings: TokenEmbeddings | None = None,
    most_chunks: int | None = None,
) -> TokenizedPrompts:
    """Everything that can be wrong with prompts is found here, before a network runs.

    `weighting` reads AUTOMATIC1111's syntax (see `weights`), else brackets are text; `truncate` keeps 77 tokens of
    each prompt where otherwise chunks are added, up to `most_chunks`; `embeddings` adds words of textual inversions.

    UsageError, about "prompt" or "negative_prompt": not text, too long, a bad weight, or an instruction of `foreign`.
    """
    words = tokenizer if embeddings is None else embeddings.extend(tokenizer)
    vectors = NO_VECTORS if embeddings is None else embeddings.vectors

    def tokenize(text: str, name: str) -> TokenizedPrompt:
        check_text(text, name)
        if len(text) > MAX_CHARACTERS:
            raise UsageError(name, got=f"{len(text)} characters", accepted=f"at most {MAX_CHARACTERS}")
        if weighting:
            refuse_instructions(text, name)
        fragments = parse_weights(text, name) if weighting else [(text, 1.0)]
        return tokenize_prompt(words, fragments, truncate=truncate, vectors=vectors, most=most_chunks, name=name)

    positive = tuple(tokenize(text, "prompt") for text in prompts)
    if negative_prompts is None:
        return TokenizedPrompts(positive, None)
    return TokenizedPrompts(positive, tuple(tokenize(text, "negative_prompt") for text in negative_prompts))


def encode_prompts(
    text_encoder: Engine, tokenizer: Tokenizer, prompts: TokenizedPrompts, embeddings: TokenEmbeddings | None = None
) -> PromptEmbeddings:
    """Encode prompts, and as many negative prompts if there is guidance.

    A plain prompt of up to 75 tokens gives what diffusers' encode_prompt gives.  With `embeddings`, `text_encoder` must
    be of the form "embeds", which takes `inputs_embeds` (n, 77, D) float32 instead of `input_ids` (n, 77) int64.

    Errors: EngineError, NumericalError (the text encoder overflowed).
    """
    positive, negative = list(prompts.positive), list(prompts.negative or ())
    pairs = list(zip(positive, negative, strict=True)) if negative else [(prompt,) for prompt in positive]
    count = max(len(prompt.chunks) for prompt in [*positive, *negative])
    filler = empty_chunk(tokenizer)
    padded = [prompt.chunks + (filler,) * (count - len(prompt.chunks)) for prompt in [*positive, *negative]]
    flat = [chunk for chunks in padded for chunk in chunks]
    hidden = encode_chunks(text_encoder, flat, embeddings)  # (rows·chunks, 77, D)
    hidden = hidden.reshape(len(padded), -1, hidden.shape[-1])  # (rows, 77·chunks, D)
    return PromptEmbeddings(
        hidden[: len(positive)],
        hidden[len(positive) :] if prompts.negative is not None else None,
        tuple(max(len(prompt.chunks) for prompt in pair) for pair in pairs),
        tuple(prompt.truncated for prompt in positive),
        tuple(prompt.truncated for prompt in negative),
    )


def encode_chunks(text_encoder: Engine, chunks: Sequence[Chunk], embeddings: TokenEmbeddings | None = None) -> Array:
    """(len(chunks), 77, D) float32: the text encoder's last hidden states, weighted.  It sees no row of ids twice."""
    index = {ids: row for row, ids in enumerate(dict.fromkeys(chunk.ids for chunk in chunks))}
    ids = np.array(list(index), np.int64)  # (n, 77)
    hidden = last_hidden_state(text_encoder, ids if embeddings is None else embeddings.look_up(ids))
    if not all_finite(hidden):
        raise NumericalError("text encoder", got="NaN or infinity", remedy=EXPORT_IN_FP32)
    rows = [hidden[index[chunk.ids]] for chunk in chunks]
    return np.stack(
        [weigh(row, chunk.weights) if chunk.weighted else row for row, chunk in zip(rows, chunks, strict=True)]
    )


def weigh(hidden: Array, weights: Sequence[float]) -> Array:
    """Scale each token's embedding (77, D) by its weight, then all of them so that their mean is what it was.

    AUTOMATIC1111's `EmphasisOriginal`, modules/sd_emphasis.py.  NumericalError where the weights cancel out."""
    weighted = hidden * np.asarray(weights, np.float32)[:, None]
    before, after = hidden.mean(dtype=np.float64), weighted.mean(dtype=np.float64)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        restored: Array = weighted * np.float32(before / after)
    if not all_finite(restored):
        raise NumericalError("prompt weights cancel each other out", remedy="use weights closer to 1")
    return restored
