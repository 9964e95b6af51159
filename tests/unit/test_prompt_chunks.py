"""Chunks of 75 tokens, cut where AUTOMATIC1111 cuts them."""

from __future__ import annotations

from functools import cache

import pytest
from fuzz_tokenizer import clip_files
from sd_runtime.errors import UsageError
from sd_runtime.prompt.chunks import Chunk, TokenizedPrompt, empty_chunk, tokenize_prompt
from sd_runtime.prompt.tokenizer import Tokenizer
from sd_runtime.prompt.weights import parse_weights

MOST = 16
BOS, EOS, COMMA, CAT, DOG = 49406, 49407, 267, 2368, 1929


@cache
def tokenizer(layout: str = "stable-diffusion-1") -> Tokenizer:
    return Tokenizer.from_bytes(clip_files(layout))


def chunks(prompt: str) -> tuple[Chunk, ...]:
    return tokenize_prompt(tokenizer(), parse_weights(prompt), truncate=False, most=MOST).chunks


def own(chunk: Chunk) -> list[int]:
    """The prompt's own tokens in a chunk."""
    assert len(chunk.ids) == len(chunk.weights) == 77 and chunk.ids[0] == BOS
    end = chunk.ids.index(EOS)
    assert set(chunk.ids[end:]) == {EOS} and set(chunk.weights[end:]) == {1.0}
    return list(chunk.ids[1:end])


def test_short_prompt() -> None:
    (chunk,) = chunks("dog in batman costume")
    assert own(chunk) == [1929, 530, 7223, 7235]
    assert not chunk.weighted


def test_empty_prompt() -> None:
    assert chunks("") == chunks(" ") == (empty_chunk(tokenizer()),)
    assert own(empty_chunk(tokenizer())) == []


def test_padding_of_stable_diffusion_2() -> None:
    (chunk,) = tokenize_prompt(tokenizer("stable-diffusion-2"), [("cat", 1.0)], truncate=False).chunks
    assert chunk.ids == (BOS, CAT, EOS, *[0] * 74)


def test_weights_go_with_their_tokens() -> None:
    (chunk,) = chunks("a (cat:1.5) [dog]")
    assert chunk.ids[2:4] == (CAT, DOG)
    assert chunk.weights == (1.0, 1.0, 1.5, 1 / 1.1, *[1.0] * 73)
    assert chunk.weighted


@pytest.mark.parametrize(("count", "sizes"), [(75, [75]), (76, [75, 1]), (150, [75, 75]), (151, [75, 75, 1])])
def test_cut_after_75_tokens(count: int, sizes: list[int]) -> None:
    assert [len(own(chunk)) for chunk in chunks("cat " * count)] == sizes


@pytest.mark.parametrize(("tail", "sizes"), [(19, [56, 30]), (20, [75, 11]), (0, [75, 11])])
def test_cut_at_a_comma_near_the_end(tail: int, sizes: list[int]) -> None:
    """With `tail` tokens between the comma and the end of the first chunk."""
    prompt = "cat " * (74 - tail) + "," + " dog" * (tail + 11)
    first, second = map(own, chunks(prompt))
    assert [len(first), len(second)] == sizes
    assert COMMA in first and COMMA not in second


def test_a_comma_counts_once() -> None:
    """After a cut at a comma, the next chunk is full at 75 tokens again."""
    assert [len(own(chunk)) for chunk in chunks("cat " * 59 + "," + " dog" * 100)] == [60, 75, 25]


def test_comma_after_a_full_chunk_starts_the_next() -> None:
    first, second = map(own, chunks("cat " * 75 + ", dog"))
    assert (len(first), second) == (75, [COMMA, DOG])


def test_break() -> None:
    assert [own(chunk) for chunk in chunks("cat BREAK dog")] == [[CAT], [DOG]]
    assert [own(chunk) for chunk in chunks("cat BREAK")] == [[CAT]]
    assert [own(chunk) for chunk in chunks("BREAK cat BREAK BREAK dog")] == [[], [CAT], [], [DOG]]
    assert [len(own(chunk)) for chunk in chunks("cat " * 75 + "BREAK dog")] == [75, 1]


def test_a_words_vectors_stay_together() -> None:
    words = tokenizer().with_words({"<toy>": 50_000})
    prompt = "cat " * 70 + "<toy> dog"
    first, second = tokenize_prompt(words, [(prompt, 1.2)], truncate=False, vectors={50_000: 6}).chunks
    assert own(first) == [CAT] * 70
    assert own(second) == [*range(50_000, 50_006), DOG]
    assert second.weights[:8] == (1.0, *[1.2] * 7)


def test_truncation_names_the_lost_words() -> None:
    result = tokenize_prompt(tokenizer(), [("cat " * 74 + "Red, (Dog) naïve!", 1.0)], truncate=True)
    assert [len(own(chunk)) for chunk in result.chunks] == [75]
    assert result.truncated == ", ( dog ) naïve !"


def test_truncation_of_short_prompts_loses_nothing() -> None:
    assert tokenize_prompt(tokenizer(), [("cat", 1.0)], truncate=True) == TokenizedPrompt(chunks("cat"))
    assert tokenize_prompt(tokenizer(), [("cat " * 75, 1.0)], truncate=True).truncated == ""


def test_truncation_of_learnt_words() -> None:
    words = tokenizer().with_words({"<Toy>": 50_000})
    result = tokenize_prompt(words, [("cat " * 72 + "<toy> <toy> é", 1.0)], truncate=True, vectors={50_000: 2})
    assert own(result.chunks[0])[72:] == [50_000, 50_001, 50_000]
    assert result.truncated == "<Toy> é"


def test_too_many_chunks() -> None:
    longest = "cat " * (75 * MOST)
    assert len(chunks(longest)) == MOST
    expected = rf"^prompt: got {75 * MOST + 1} tokens in {MOST + 1} chunks, accepted at most {MOST} chunks"
    with pytest.raises(UsageError, match=expected):
        chunks(longest + "dog")
    remedy = r"shorten 'a blurry picture of cat cat c…' or let it be cut off with `truncate`$"
    with pytest.raises(UsageError, match=remedy):  # prompt or negative prompt: its beginning says which
        chunks(f"(a blurry picture:1.2) of {longest}")


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "cat " * 25_000, "日" * 33_333, "BREAK " * 16_000], ids=lambda text: text[:6]
)
def test_hundred_kilobytes(text: str) -> None:
    with pytest.raises(UsageError, match=r"^prompt: got .* accepted at most"):
        chunks(text)
    result = tokenize_prompt(tokenizer(), [(text, 1.0)], truncate=True)
    assert len(result.chunks) == 1 and result.truncated
