"""Prompts as texts → embeddings: what a pipeline does in two steps, in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd_runtime.engines.protocol import Engine
from sd_runtime.prompt import PromptEmbeddings, TokenEmbeddings, Tokenizer, encode_prompts, tokenize_prompts


def encode_texts(
    text_encoder: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    embeddings: TokenEmbeddings | None = None,
    **settings: Any,
) -> PromptEmbeddings:
    tokenized = tokenize_prompts(tokenizer, prompts, negative_prompts, embeddings=embeddings, **settings)
    return encode_prompts(text_encoder, tokenizer, tokenized, embeddings)
