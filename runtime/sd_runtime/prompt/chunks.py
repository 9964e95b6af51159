"""Weighted fragments of text → chunks of 77 tokens, the only length that CLIP's text encoder takes.

    begin, up to 75 tokens of the prompt, end, padding

A prompt of more than 75 tokens gets several chunks, which are encoded apart and laid end to end.  Where it is cut
follows AUTOMATIC1111 (`tokenize_line` in modules/sd_hijack_clip.py): at a BREAK, else after 75 tokens, but if there is
a comma among the last 20 of them, what follows the comma moves on to the next chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError, one_line
from .tokenizer import Tokenizer
from .weights import BREAK, Fragment

LENGTH = 77  # tokens the text encoder takes
ROOM = LENGTH - 2  # ... of which are the prompt's own
BACKTRACK = 20  # AUTOMATIC1111's default comma_padding_backtrack

NO_VECTORS: Mapping[int, int] = {}


@dataclass(frozen=True)
class Chunk:
    """What one row of the text encoder's input holds: 77 token ids, and the weight of each one's embedding."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def weighted(self) -> bool:
        return any(weight != 1.0 for weight in self.weights)


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's chunks, at least one, and the text that was cut off, "" if none was."""

    chunks: tuple[Chunk, ...]
    truncated: str = ""


# One token of the prompt: the rows of the embedding table it stands for (several for a textual inversion), its weight.
Token = tuple[Sequence[int], float]


def tokenize_prompt(
    tokenizer: Tokenizer,
    fragments: Iterable[Fragment],
    *,
    truncate: bool,
    vectors: Mapping[int, int] = NO_VECTORS,
    most: int | None = None,
    name: str = "prompt",
) -> TokenizedPrompt:
    """Cut a prompt into chunks or, with `truncate`, keep its first 75 tokens as diffusers does (BREAK then is nothing).

    `vectors` says which ids stand for several vectors, and how many: id, id + 1, …  A token's vectors stay together.
    UsageError, about the argument `name`, for a prompt of more chunks than `most`, if that is given.
    """
    fragments = list(fragments)
    sections = list(_sections(tokenizer, fragments, vectors))
    if truncate:
        return _truncated(tokenizer, [token for section in sections for token in section])
    (comma,) = tokenizer.encode(",")[-1:]
    filled = [rows for section in sections for rows in _fill(section, comma)]
    if most is not None and len(filled) > most:
        beginning = one_line("".join(text for text, _ in fragments).lstrip(), limit=30)
        raise UsageError(
            name,
            got=f"{sum(map(len, filled))} tokens in {len(filled)} chunks",
            accepted=f"at most {most} chunks of {ROOM} tokens",
            remedy=f"shorten {beginning!r} or let it be cut off with `truncate`",
        )
    return TokenizedPrompt(tuple(_chunk(tokenizer, rows) for rows in filled))


def _truncated(tokenizer: Tokenizer, tokens: Sequence[Token]) -> TokenizedPrompt:
    rows: list[tuple[int, float]] = []
    lost: list[int] = []
    for ids, weight in tokens:
        rows += [(row, weight) for row in ids]
        if len(rows) > ROOM:
            lost.append(ids[0])
    return TokenizedPrompt((_chunk(tokenizer, rows[:ROOM]),), tokenizer.decode(lost))


def empty_chunk(tokenizer: Tokenizer) -> Chunk:
    """The chunk of an empty prompt, which also fills short prompts up to the length of long ones."""
    return _chunk(tokenizer, [])


def _sections(tokenizer: Tokenizer, fragments: Iterable[Fragment], vectors: Mapping[int, int]) -> Iterator[list[Token]]:
    """The tokens between BREAKs.  What follows the last BREAK counts only if there is something."""
    section: list[Token] = []
    empty = True
    for fragment in fragments:
        if fragment == BREAK:
            yield section
            section, empty = [], False
        else:
            text, weight = fragment
            section += [(range(i, i + vectors.get(i, 1)), weight) for i in tokenizer.encode(text)]
    if section or empty:
        yield section


def _fill(tokens: Sequence[Token], comma: int) -> Iterator[list[tuple[int, float]]]:
    """Chunks of at most 75 (embedding row, weight) each; one empty chunk for no tokens."""
    chunk: list[tuple[int, float]] = []
    after_comma = 0  # where the text after this chunk's last comma starts; 0: no comma yet
    for rows, weight in tokens:
        is_comma = rows[0] == comma
        if len(chunk) == ROOM and after_comma and not is_comma and ROOM - after_comma < BACKTRACK:
            yield chunk[:after_comma]
            chunk, after_comma = chunk[after_comma:], 0
        if is_comma:
            after_comma = len(chunk) + 1
        if len(chunk) + len(rows) > ROOM:
            yield chunk
            chunk, after_comma = [], 0
        chunk += [(row, weight) for row in rows]
    yield chunk


def _chunk(tokenizer: Tokenizer, rows: Sequence[tuple[int, float]]) -> Chunk:
    padding = ROOM - len(rows)
    ids = (tokenizer.bos_id, *(row for row, _ in rows), tokenizer.eos_id, *[tokenizer.pad_id] * padding)
    return Chunk(ids, (1.0, *(weight for _, weight in rows), 1.0, *[1.0] * padding))
