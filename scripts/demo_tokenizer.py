"""Trains a small byte-level BPE and writes it in CLIP's file format (Sennrich et al. 2016, section 3.2)."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"

Symbols = tuple[str, ...]
Pair = tuple[str, str]


def train_tokenizer(captions: Iterable[str], merges: int) -> tuple[dict[str, int], list[Pair]]:
    """(vocabulary, merges): at most `merges` of them, fewer where the captions have no pairs left to merge."""
    counts = Counter(word for caption in captions for word in re.findall(r"[a-z]+|[^\sa-z]", caption))
    words = {word: _spell(word) for word in counts}
    learned: list[Pair] = []
    while len(learned) < merges:
        pairs: Counter[Pair] = Counter()
        for word, symbols in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        words = {word: _merge(symbols, best) for word, symbols in words.items()}
        learned.append(best)
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, learned), START, END]
    return {token: index for index, token in enumerate(tokens)}, learned


def save_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[Pair]) -> None:
    """vocab.json, merges.txt and the two configs from which transformers' CLIPTokenizer loads."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special), encoding="utf-8")


def byte_letters() -> dict[int, str]:
    """A printable character for each of the 256 bytes, in the order of CLIP's vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _spell(word: str) -> Symbols:
    letters = [byte_letters()[byte] for byte in word.encode()]
    return (*letters[:-1], letters[-1] + END_OF_WORD)


def _merge(symbols: Symbols, pair: Pair) -> Symbols:
    """`symbols` with every occurrence of `pair`, from the left, made one symbol."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)
