"""The tokenizer's files: from a checkpoint folder, or CLIP's own for checkpoints that carry none.

The runtime reads vocab.json and merges.txt.  Folders saved by transformers 5 hold the same facts in tokenizer.json
only, and a single-file checkpoint holds none of them: all Stable Diffusion 1.x models use CLIP ViT-L/14's vocabulary
(Radford et al. 2021), which is made here from its merge list, byte for byte as published with Stable Diffusion 1.5.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_runtime.bundle.schema import parse_json
from sd_runtime.errors import BundleError, ExportError
from sd_runtime.prompt.vocabulary import FILES as FILES  # what the runtime reads, a bundle carries

CLIP_MERGES = Path(__file__).with_name("clip_merges.txt.gz")
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def complete(files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """`files` of a tokenizer folder, with vocab.json and merges.txt made from tokenizer.json where they are missing.

    ExportError: there is neither, or tokenizer.json, which wins where it exists, is not of CLIP's kind."""
    separate = {"vocab.json", "merges.txt"} <= files.keys()
    if separate and "tokenizer.json" not in files:
        return dict(files)
    if "tokenizer.json" not in files:
        raise ExportError(f"{where}: the tokenizer is incomplete", accepted="vocab.json and merges.txt in tokenizer/")
    try:
        document = parse_json(files["tokenizer.json"], "tokenizer.json")
        vocab, merges = _from_tokenizer_json(document)
    except (BundleError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ExportError(f"{where}: tokenizer/tokenizer.json is not a CLIP byte-pair tokenizer") from error
    made = {} if separate else {"vocab.json": _vocab_json(vocab), "merges.txt": _merges_txt(merges)}
    return dict(files) | made


def clip(pad: str = CLIP_SPECIAL[1]) -> dict[str, bytes]:
    """The files of CLIP's tokenizer, 49408 tokens: as in Stable Diffusion 1.5, padded with the end-of-text token; with
    pad "!" as in Stable Diffusion 2."""
    text = gzip.decompress(CLIP_MERGES.read_bytes()).decode()
    merges = text.splitlines()[1:]
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in merges), *CLIP_SPECIAL]
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), CLIP_SPECIAL[1])
    special |= {"bos_token": CLIP_SPECIAL[0], "pad_token": pad}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        "vocab.json": _vocab_json({token: index for index, token in enumerate(tokens)}),
        "merges.txt": text.encode(),
        "tokenizer_config.json": _pretty(config | special),
        "special_tokens_map.json": _pretty(special),
    }


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's and CLIP's vocabularies, in the order of their token ids:
    first the bytes that print as themselves in Latin-1, then the rest, shifted to U+0100 and above."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _from_tokenizer_json(document: Any) -> tuple[dict[str, int], list[str]]:
    """The vocabulary and the merges ("a b") of a tokenizers-library document; its two styles of merge are read."""
    model = document["model"]
    if model["type"] != "BPE" or model["end_of_word_suffix"] != "</w>":
        raise ValueError("not CLIP's kind of byte-pair encoding")
    added = {str(token["content"]): int(token["id"]) for token in document["added_tokens"]}
    vocab = {str(token): int(index) for token, index in model["vocab"].items()} | added
    return vocab, [merge if isinstance(merge, str) else f"{merge[0]} {merge[1]}" for merge in model["merges"]]


def _vocab_json(vocab: Mapping[str, int]) -> bytes:
    return _pretty(dict(sorted(vocab.items())))


def _merges_txt(merges: list[str]) -> bytes:
    return "\n".join(["#version: 0.2", *merges, ""]).encode()


def _pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
