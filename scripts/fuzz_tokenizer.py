#!/usr/bin/env python3
"""Compare our CLIP tokenizer with transformers' CLIPTokenizer on random strings, under every layout of its files.

Then time both on 100 kB of hostile text.

    scripts/fuzz_tokenizer.py [--count 50000] [--seed 0]

The vocabulary is the real one of SD 1.x and 2.x.  Strings hold only code points that this Python's Unicode tables know:
a newer character is neither letter nor digit to us until Python learns of it.  Exit code 1: there was a mismatch.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sd_runtime.prompt.tokenizer import ALPHABET, Tokenizer

BPE = Path(__file__).resolve().parent.parent / "tests/data/bpe_simple_vocab_16e6.txt.gz"
LAYOUTS = ("stable-diffusion-1", "stable-diffusion-2", "plain", "added")

NASTY = (
    "",
    " ",
    "a photo of an astronaut riding a horse on mars",
    "dog in batman costume",
    "A Dog's ball! I'LL, don't; 'S 's''s ''ve'Ve",
    "<|startoftext|>a<|endoftext|>b <|STARTOFTEXT|> <|EndOfText|>!! !!<|STARTOFTEXT|>!!<|endoftext|",
    "<|startoftext<|startoftext|>|> <|<|endoftext|>|>",
    "1234 4.5 ½ ² Ⅷ ٣ 一二三 1st x2y",
    "naïve café nai\u0308ve cafe\u0301 \u0301\u0327\u0301 \u212b \u1e9b\u0323 \ufb01 \uac00\u1100\u1161\u11a8",
    "ΣΑΣ ΌΔΟΣ. ς İstanbul ISTANBUL ẞß ǅ ſs 'ſ \u0130\u0307",
    "日本語のテキスト 한국어 русский العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈 😀😀 ❤️ 1️⃣ \U0001f9d1🏽",
    "\t\n\v\f\r \x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff",
    "a\x00b\x7fc\x80d\xad e\u200cf\u200dg",
    "hello!!!! ,,,, ---- ____ ((((a:1.3)))) [b] \\ // @@ ## $$ %% ^^ && **",
    "x" * 300 + "<|" * 50 + "é" * 100 + "!" * 99,
    "<cat-toy> a<CAT-toy>s Big  Cat big cat BIG\tCAT",
    "\U0010ffff \ue000 \ufffd \ufffe \u0378"[:-1],
)


def clip_files(layout: str = "stable-diffusion-1") -> dict[str, bytes]:
    """The files of a CLIP tokenizer folder, by name, as the repositories that use it lay them out."""
    lines = gzip.decompress(BPE.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    symbols = [ALPHABET[byte] for byte in sorted(ALPHABET, key=lambda byte: (ord(ALPHABET[byte]) > 255, byte))]
    words = [*symbols, *[symbol + "</w>" for symbol in symbols], *[line.replace(" ", "") for line in lines]]
    ids = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    files: dict[str, Any] = {"vocab.json": ids}
    if layout != "plain":
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        contents = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
        pad = "!" if layout == "stable-diffusion-2" else "<|endoftext|>"
        special = {f"{role}_token": {"content": content, **flags} for role, content in contents.items()}
        files["special_tokens_map.json"] = {**special, "pad_token": pad}
        typed = {role: {"__type": "AddedToken", **token} for role, token in special.items()}
        files["tokenizer_config.json"] = {**typed, "pad_token": pad, "model_max_length": 77}
    if layout == "added":
        files["added_tokens.json"] = {"<cat-toy>": len(ids), "Big Cat": len(ids) + 1}
    encoded = {name: json.dumps(value, ensure_ascii=False).encode() for name, value in files.items()}
    return {**encoded, "merges.txt": ("#version: 0.2\n" + "\n".join(lines) + "\n").encode()}


def reference_tokenizer(files: dict[str, bytes]) -> Any:
    """transformers' CLIPTokenizer from the same files."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return CLIPTokenizer.from_pretrained(folder)


def known_characters() -> list[str]:
    """Every character of this Python's Unicode tables but surrogates and private use."""
    characters = (chr(code) for code in range(sys.maxunicode + 1))
    return [c for c in characters if unicodedata.category(c) not in ("Cn", "Cs", "Co")]


def strings(seed: int, count: int) -> Iterator[str]:
    """`count` random strings that mix words, punctuation, marks, digits, scripts, blanks and special tokens."""
    rng, everything = random.Random(seed), known_characters()
    marks = [c for c in everything if unicodedata.combining(c)]
    cased = [c for c in everything if c.lower() != c or c.upper() != c]
    numbers = [c for c in everything if unicodedata.category(c)[0] == "N"]
    blanks = [c for c in everything if c.isspace() or unicodedata.category(c) in ("Zs", "Cf")]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [symbol.removesuffix("</w>") for symbol in json.loads(clip_files("plain")["vocab.json"])]
    special = ["<|startoftext|>", "<|endoftext|>", "<|StartOfText|>", "<|", "|>", "startoftext", "<cat-toy>", "Big Cat"]
    contractions = ["'s", "'S", "'t", "'re", "'ve", "'M", "'ll", "'d", "''", "n't"]
    sources: Sequence[Sequence[str]] = (
        words, letters, letters.upper(), everything, everything, marks, cased, numbers, blanks, special, contractions,
        "0123456789", " ", "!,.;:-_()[]\\/'\"<|>", [chr(code) for code in range(256)],
    )  # fmt: skip
    for _ in range(count):
        mix = rng.sample(range(len(sources)), rng.randint(1, 5))
        yield "".join(rng.choice(sources[rng.choice(mix)]) for _ in range(rng.choice((3, 10, 30, 100))))


def mismatches(layout: str, texts: Sequence[str]) -> list[str]:
    """The texts that the two tokenizers cut differently."""
    files = clip_files(layout)
    ours, theirs = Tokenizer.from_bytes(files), reference_tokenizer(files)
    expected = theirs(list(texts), add_special_tokens=False).input_ids
    return [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids]


def hostile(size: int = 100_000) -> dict[str, str]:
    """Texts of `size` bytes that a tokenizer could be slow at."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return {
        "one word, one letter": "a" * size,
        "one word, random letters": "".join(rng.choices(letters, k=size)),
        "one word, frequent letters": "".join(rng.choices("etaoinsh", k=size)),
        "one word, Chinese": "日" * (size // 3),
        "one run of punctuation": "".join(rng.choices("!?.,-", k=size)),
        "random words": "".join(rng.choices(letters + "      ", k=size)),
        "digits": "1" * size,
        "emoji": "😀" * (size // 4),
        "combining marks": "\u0301\u0327" * (size // 4),
        "halves of special tokens": "<|" * (size // 2),
    }


def milliseconds(function: Callable[[], object], rounds: int = 5) -> float:
    """The best of several calls."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds) * 1000


def print_times() -> None:
    files = clip_files()
    ours, theirs = Tokenizer.from_bytes(files), reference_tokenizer(files)
    print(f"construct: {milliseconds(partial(Tokenizer.from_bytes, files)):.1f} ms")
    for name, text in hostile().items():
        mine, reference = milliseconds(partial(ours.encode, text)), milliseconds(partial(theirs, text))
        print(f"100 kB, {name}: {mine:.1f} ms, transformers {reference:.1f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=50_000, help="random strings beside the fixed ones")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = [*NASTY, *strings(args.seed, args.count)]
    size, unicode = sum(map(len, texts)), unicodedata.unidata_version
    print(f"seed {args.seed}: {len(texts)} strings, {size} characters of Unicode {unicode}")
    failed = 0
    for layout in LAYOUTS:
        wrong = mismatches(layout, texts)
        failed += len(wrong)
        print(f"{layout}: {len(wrong)} mismatches")
        for text in wrong[:10]:
            print(f"    {text!a}")
    print_times()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
