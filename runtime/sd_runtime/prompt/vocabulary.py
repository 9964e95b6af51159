"""The files of a CLIP tokenizer folder → Vocabulary.

Three generations of transformers wrote three layouts, and all of them are met in the wild:

    vocab.json, merges.txt                      always, until transformers 5
    tokenizer.json                              both of the above in one file; it wins where it exists
    special_tokens_map.json, added_tokens.json  the special tokens, unless
    tokenizer_config.json                       has `added_tokens_decoder`, which then says it all

Which file overrides which is transformers 5's rule (`PreTrainedTokenizerBase._from_pretrained`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError, one_line

FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
MAX_IDS = 1 << 24  # hundreds of times CLIP's 49408; what the text encoder takes is `networks.text_encoder`'s to check
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_ROLES = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


@dataclass(frozen=True)
class AddedToken:
    """Text that is one token wherever it stands, whatever the merges say.

    It is looked for in the text as typed or, if `normalized`, in the text after normalisation, itself normalised."""

    content: str
    normalized: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made of: `ids` of all tokens, `merges` ("left right") by priority, tokens that are `added`
    beside them, and which token begins, ends, fills and stands for the unknown."""

    ids: dict[str, int]
    merges: list[str]
    added: tuple[AddedToken, ...]
    bos: str
    eos: str
    unk: str
    pad: str


def read_folder(folder: Path) -> dict[str, bytes]:
    """The bytes of those files of `folder` that a tokenizer is made of."""
    try:
        return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    except OSError as error:
        raise BundleError(f"tokenizer folder {folder}: {error.strerror}") from error


def read_vocabulary(files: Mapping[str, bytes]) -> Vocabulary:
    """File name → content, as they lie in a tokenizer folder.  BundleError where they are missing or not understood."""
    config = _json_object(files, "tokenizer_config.json")
    combined = _json_object(files, "tokenizer.json")
    try:
        ids, merges = _combined_tables(combined) if combined else _separate_tables(files)
        file = "tokenizer.json" if combined else "vocab.json"
        if set(map(type, ids.values())) != {int}:
            wrong = next((item for item in ids.items() if type(item[1]) is not int), None)
            raise BundleError(f"tokenizer: vocabulary in {file}", got=wrong, accepted="text → id, a whole number")
        for index in (min(ids.values()), max(ids.values())):
            if not 0 <= index < MAX_IDS:
                raise BundleError(f"{file}: token id", got=index, accepted=f"0 … {MAX_IDS - 1}")
        if "added_tokens_decoder" not in config:
            config = {**config, **_json_object(files, "special_tokens_map.json")}
        added = _added_tokens(files, config, combined)
        roles = {role: _added_token(config.get(role) or DEFAULT_ROLES[role]).content for role in DEFAULT_ROLES}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        names = ", ".join(name for name in FILES if name in files)
        raise BundleError(
            f"tokenizer: files not understood: {names} ({type(error).__name__}: {one_line(str(error))})"
        ) from error
    # The same content may be listed twice with different flags; the later one counts, as in transformers.
    last = {token.content: token for token in added if token.content}
    for content in last:  # what the vocabulary lacks gets the ids after it
        ids.setdefault(content, len(ids))
    bos, eos, unk, pad = (roles[f"{name}_token"] for name in ("bos", "eos", "unk", "pad"))
    return Vocabulary(ids, merges, tuple(last.values()), bos, eos, unk, pad)


def _added_tokens(
    files: Mapping[str, bytes], config: Mapping[str, Any], combined: Mapping[str, Any]
) -> list[AddedToken]:
    """The tokens listed as added, then the special ones that are not among them."""
    if "added_tokens_decoder" in config:
        decoder = {int(index): token for index, token in config["added_tokens_decoder"].items()}
        added = [_added_token(decoder[index]) for index in sorted(decoder)]
    else:
        added = [*_added_tokens_file(files, config), *map(_added_token, combined.get("added_tokens", ()))]
    known = {token.content for token in added}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    for value in (*(config.get(role) or DEFAULT_ROLES.get(role) for role in ROLES), *extra):
        if value and (token := _added_token(value, special=True)).content not in known and token not in added:
            added.append(token)
    return added


def _separate_tables(files: Mapping[str, bytes]) -> tuple[dict[str, int], list[str]]:
    missing = [name for name in ("vocab.json", "merges.txt") if name not in files]
    if missing:
        raise BundleError(
            f"tokenizer: {' and '.join(missing)} missing", accepted="vocab.json + merges.txt, or tokenizer.json"
        )
    return _json_object(files, "vocab.json"), _merge_lines(files["merges.txt"])


def _merge_lines(data: bytes) -> list[str]:
    """merges.txt: a comment with its version, then one "left right" a line."""
    try:
        text = data.decode().replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise BundleError(f"merges.txt is not UTF-8 ({error})") from error
    if text.startswith("#version"):
        _, _, text = text.partition("\n")
    lines = text.split("\n")
    if text.count(" ") != len(lines):
        raise BundleError(
            "merges.txt", got=f"{len(lines)} lines, {text.count(' ')} blanks", accepted="one blank a line"
        )
    return lines


def _combined_tables(combined: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    model = combined.get("model", {})
    if model.get("end_of_word_suffix") != "</w>" or "merges" not in model:
        raise BundleError(
            "tokenizer.json: model", got=model.get("type"), accepted="CLIP's BPE with end_of_word_suffix </w>"
        )
    return model["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _added_tokens_file(files: Mapping[str, bytes], config: Mapping[str, Any]) -> list[AddedToken]:
    """added_tokens.json (token → id, written before `added_tokens_decoder` existed), by id."""
    special = {_added_token(config[role]).content for role in ROLES if config.get(role)}
    listed = sorted(_json_object(files, "added_tokens.json").items(), key=lambda item: int(item[1]))
    return [AddedToken(content, normalized=content not in special) for content, _ in listed]


def _added_token(value: Any, *, special: bool = False) -> AddedToken:
    """A token as the JSON files have it: plain text, or an object with flags.  Special ones default to as typed."""
    if isinstance(value, str):
        return AddedToken(value)
    if any(value.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
        raise BundleError("tokenizer: added token", got=value, accepted="lstrip, rstrip and single_word false")
    return AddedToken(value["content"], value.get("normalized", not (special or value.get("special", False))))


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} is not valid JSON ({one_line(str(error))})") from error
    if not isinstance(value, dict):
        raise BundleError(name, got=type(value).__name__, accepted="a JSON object")
    return value
