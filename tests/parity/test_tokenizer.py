"""The tokenizer against transformers' CLIPTokenizer, on the vocabulary of SD 1.x and 2.x."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fuzz_tokenizer import LAYOUTS, NASTY, clip_files, known_characters, mismatches, reference_tokenizer, strings
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_runtime.errors import BundleError, UsageError
from sd_runtime.prompt.normalization import LONG, compose
from sd_runtime.prompt.tokenizer import Tokenizer, merge, symbols

DEMO = Path(__file__).parents[2] / "export/sd_export/demo_checkpoint/tokenizer"


@cache
def ours(layout: str = "stable-diffusion-1") -> Tokenizer:
    return Tokenizer.from_bytes(clip_files(layout))


@cache
def theirs(layout: str = "stable-diffusion-1") -> Any:
    return reference_tokenizer(clip_files(layout))


def changed(files: dict[str, bytes], name: str, **values: object) -> dict[str, bytes]:
    return {**files, name: json.dumps({**json.loads(files.get(name, b"{}")), **values}).encode()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_transformers(layout: str) -> None:
    """The nasty corpus and random strings; scripts/fuzz_tokenizer.py runs more of them."""
    assert mismatches(layout, [*NASTY, *strings(seed=1, count=1000)]) == []


@settings(derandomize=True)
@given(st.text(st.sampled_from(known_characters()), max_size=50))
def test_equals_transformers_on_any_text(text: str) -> None:
    assert ours().encode(text) == theirs()(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_ids_and_padding(layout: str) -> None:
    tokenizer, reference = ours(layout), theirs(layout)
    expected = (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id, reference.unk_token_id)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == expected
    assert tokenizer.pad_id == (0 if layout == "stable-diffusion-2" else 49407)


def test_known_ids() -> None:
    assert ours().encode("dog in batman costume") == [1929, 530, 7223, 7235]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_file_layout_of_transformers_5(layout: str, tmp_path: Path) -> None:
    theirs(layout).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert [tokenizer.encode(text) for text in NASTY] == [ours(layout).encode(text) for text in NASTY]


def test_layout_with_added_tokens_decoder() -> None:
    """What transformers 4.34 and later wrote: special_tokens_map.json no longer counts."""
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {
        "49406": {"content": "<|startoftext|>", **token},
        "49407": {"content": "<|endoftext|>", **token},
        "49408": {"content": "Red Fox", **token, "special": False},
        "49409": {"content": "BLUE fox", **token, "normalized": True, "special": False},
    }
    files = changed(clip_files("stable-diffusion-2"), "tokenizer_config.json", added_tokens_decoder=decoder)
    files = changed(files, "special_tokens_map.json", pad_token="<|nonsense|>")
    tokenizer, reference = Tokenizer.from_bytes(files), reference_tokenizer(files)
    texts = [*NASTY, "a Red Fox, a red fox, a Blue  Fox", "<|STARTOFTEXT|>", "hello!"]
    assert [tokenizer.encode(text) for text in texts] == reference(texts, add_special_tokens=False).input_ids
    assert tokenizer.pad_id == reference.pad_token_id == 0


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False}
BOS, EOS = {"content": "<|startoftext|>", **FLAGS}, {"content": "<|endoftext|>", **FLAGS}


@pytest.mark.parametrize(
    "written",
    [
        {"added_tokens.json": {"<|startoftext|>": 49406, "<|endoftext|>": 49407, "Big Cat": 49408}},
        {"special_tokens_map.json": {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}},
        {"special_tokens_map.json": {"bos_token": {**BOS, "normalized": True, "special": False}}},
        {"special_tokens_map.json": {"mask_token": "<mask>", "additional_special_tokens": ["<One>", "", "<two>"]}},
        {"tokenizer_config.json": {"bos_token": {"__type": "AddedToken", **BOS}, "pad_token": None}},
        {"tokenizer_config.json": {"extra_special_tokens": ["<One>", "<two>"]}},
    ],
    ids=lambda written: json.dumps(written)[:60],
)
def test_layouts_seldom_seen(written: dict[str, dict[str, Any]]) -> None:
    files = clip_files("plain")
    for name, values in written.items():
        files = changed(files, name, **values)
    tokenizer, reference = Tokenizer.from_bytes(files), reference_tokenizer(files)
    texts = [*NASTY, "<|STARTOFTEXT|> <|ENDOFTEXT|> big cat Big Cat <One> <one> <TWO> <mask>"]
    assert [tokenizer.encode(text) for text in texts] == reference(texts, add_special_tokens=False).input_ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)


def test_demo_tokenizer() -> None:
    from transformers import CLIPTokenizer

    tokenizer, reference = Tokenizer.from_folder(DEMO), CLIPTokenizer.from_pretrained(DEMO)
    texts = [*NASTY, *strings(seed=2, count=200), "a large red star on the left on a blue background"]
    assert [tokenizer.encode(text) for text in texts] == reference(texts, add_special_tokens=False).input_ids


def test_unknown_bytes_become_the_unknown_token() -> None:
    files = clip_files("plain")
    ids = {token: index for token, index in json.loads(files["vocab.json"]).items() if token not in ("q", "q</w>")}
    merges = [line for line in files["merges.txt"].decode().split("\n") if "q" not in line]
    ids = {token: ids[token] for token in ids if "q" not in token}
    files = {"vocab.json": json.dumps(ids).encode(), "merges.txt": "\n".join(merges).encode()}
    tokenizer, reference = Tokenizer.from_bytes(files), reference_tokenizer(files)
    for text in ("quick", "a q b", "qqq", "iraq"):
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_id in tokenizer.encode(text)


@pytest.mark.parametrize("text", ["a photo of a cat", "A Dog's ball!", "日本語 naïve", "hello<|endoftext|>x", ""])
def test_decode(text: str) -> None:
    ids = ours().encode(text)
    assert ours().decode(ids) == theirs().decode(ids)


# Hostile input: no clocks, the work is counted.


class Counting(dict[str, int]):
    """A dictionary that counts its look-ups."""

    lookups = 0

    def get(self, key: str, default: Any = None) -> Any:
        self.lookups += 1
        return super().get(key, default)


@cache
def merge_lines() -> list[str]:
    return clip_files("plain")["merges.txt"].decode().split("\n")[1:-1]


HOSTILE = {
    "one letter": "a",
    "two letters": "ab",
    "one mark": "!",
    "letters": "thequickbrownfoxjumpsoverthelazydogandzillionsmore",
    "three bytes each": "日",
    "four bytes each": "😀",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
def test_work_grows_with_the_length_of_a_word(unit: str) -> None:
    ranks = Counting({line: rank for rank, line in enumerate(merge_lines())})
    word = symbols(unit * (20_000 // len(unit)))
    merged = merge(word, merge_lines(), ranks)
    assert "".join(merged) == "".join(word)
    assert ranks.lookups <= 3 * len(word)


@pytest.mark.parametrize(
    "text",
    ["a" * 100_000, "é" * 50_000, "\u0301\u0327" * 25_000, "<|" * 50_000, " " * 100_000, "'" * 100_000, "1" * 100_000],
    ids=ascii,
)
def test_hundred_kilobytes_equal_transformers(text: str) -> None:
    assert ours().encode(text) == theirs()(text, add_special_tokens=False).input_ids


@settings(derandomize=True)
@given(
    st.text(st.sampled_from([c for c in known_characters() if unicodedata.combining(c)] + ["a", "ệ", "각"]), min_size=1)
)
def test_sorted_marks_compose_to_the_same(text: str) -> None:
    long = text * (LONG // len(text) + 1)
    assert compose(long) == unicodedata.normalize("NFC", long)


def textbook_merge(word: list[str], ranks: Mapping[str, int]) -> list[str]:
    """Byte-pair encoding as the paper's algorithm 1 has it: find the best pair, join it everywhere, look again."""
    while True:
        pairs = [f"{a} {b}" for a, b in pairwise(word)]
        known = [pair for pair in pairs if pair in ranks]
        if not known:
            return word
        first, second = min(known, key=lambda pair: ranks[pair]).split(" ")
        joined: list[str] = []
        for symbol in word:
            if joined and joined[-1] == first and symbol == second:
                joined[-1] = first + second
            else:
                joined.append(symbol)
        word = joined


@settings(derandomize=True)
@given(st.text("abcdhe tion'é", min_size=1, max_size=60).filter(lambda text: " " not in text))
def test_merge_equals_the_textbook(text: str) -> None:
    ranks = {line: rank for rank, line in enumerate(merge_lines())}
    assert merge(symbols(text), merge_lines(), ranks) == textbook_merge(symbols(text), ranks)


# Bad input.


@pytest.mark.parametrize(
    ("value", "got"), [("a\ud800b", "U\\+D800 at character 1"), (b"a", "bytes"), (None, "None"), (7, "int")]
)
def test_not_text(value: Any, got: str) -> None:
    with pytest.raises(UsageError, match=rf"^prompt: got {got}"):
        ours().encode(value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"vocab\.json and merges\.txt missing"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(BundleError, match=r"tokenizer: merges\.txt missing"):
        Tokenizer.from_bytes({"vocab.json": b"{}"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"{", "vocab.json is not valid JSON"),
        ("vocab.json", b"[]", "vocab.json: got list"),
        ("vocab.json", b'{"a": "1"}', "tokenizer: vocabulary"),
        (
            "vocab.json",
            b'{"a": 18446744073709551616}',
            r"vocab.json: token id: got 18446744073709551616, accepted 0 … ",
        ),
        (
            "vocab.json",
            b'{"a": -1}',
            r"vocab.json: token id: got -1, accepted 0 … ",
        ),
        ("vocab.json", b'{"a": true}', r"tokenizer: vocabulary in vocab.json: got \('a', True\)"),
        ("vocab.json", b"[" * 100_000, "vocab.json is not valid JSON"),
        ("merges.txt", b"\xff", "merges.txt is not UTF-8"),
        ("merges.txt", b"a b c\n", "merges.txt: got 1 lines, 2 blanks"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 3}', "tokenizer"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "tokenizer"),
        ("added_tokens.json", b'{"a": []}', "tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "tokenizer.json: model: got Unigram"),
        ("tokenizer.json", b'{"model": 3}', "tokenizer"),
        ("special_tokens_map.json", b'{"mask_token": {"content": "m", "lstrip": true}}', "added token"),
    ],
)
def test_damaged_files(name: str, content: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Tokenizer.from_bytes({**clip_files("plain"), name: content})


def test_vocabulary_and_merges_of_different_models() -> None:
    ids = {token: index for index, token in enumerate(json.loads(clip_files("plain")["vocab.json"])) if index < 512}
    files = {**clip_files("plain"), "vocab.json": json.dumps(ids).encode()}
    with pytest.raises(BundleError, match=r"merges.txt makes the token 'hello</w>', which vocab.json lacks"):
        Tokenizer.from_bytes(files).encode("hello")
