"""The tokenizer's files of a checkpoint, made where the checkpoint has none."""

from __future__ import annotations

import hashlib
import json

import pytest
from sd_export.source import resolve_checkpoint, tokenizer
from sd_runtime.errors import ExportError
from transformers import CLIPTokenizer

# SHA-256 of tokenizer/vocab.json and tokenizer/merges.txt as published with Stable Diffusion 1.5 (and 1.4, 2.1)
VOCAB_JSON = "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"
MERGES_TXT = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def write(folder, files) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_clip_files_are_the_published_ones() -> None:
    files = tokenizer.clip()
    assert hashlib.sha256(files["vocab.json"]).hexdigest() == VOCAB_JSON
    assert hashlib.sha256(files["merges.txt"]).hexdigest() == MERGES_TXT


def test_clip_files_give_the_known_ids(tmp_path) -> None:
    write(tmp_path / "tokenizer", tokenizer.clip())
    reference = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert reference("dog in batman costume").input_ids == [49406, 1929, 530, 7223, 7235, 49407]
    assert reference.model_max_length == 77
    assert (reference.pad_token_id, reference.bos_token_id, reference.eos_token_id) == (49407, 49406, 49407)


def test_folder_with_tokenizer_json_only(folder) -> None:
    """What transformers 5 saves; vocab.json and merges.txt follow from it, byte for byte."""
    assert {path.name for path in (folder / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    files = resolve_checkpoint(str(folder)).tokenizer
    assert files["vocab.json"] == tokenizer.clip()["vocab.json"]
    assert files["merges.txt"] == tokenizer.clip()["merges.txt"]


def test_older_style_of_merges(folder) -> None:
    path = folder / "tokenizer/tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
    path.write_text(json.dumps(document))
    assert resolve_checkpoint(str(folder)).tokenizer["merges.txt"] == tokenizer.clip()["merges.txt"]


def test_files_of_the_folder_are_passed_on_unchanged(folder) -> None:
    for name, content in tokenizer.clip().items():
        (folder / "tokenizer" / name).write_bytes(content)
    (folder / "tokenizer/merges.txt").write_bytes(b"#version: 0.2\na b\n")
    assert resolve_checkpoint(str(folder)).tokenizer["merges.txt"] == b"#version: 0.2\na b\n"


@pytest.mark.parametrize(
    "text", [b"{}", b"[]", b"null", b'{"model": {"type": "WordPiece"}}', b'{"model": {"type": "BPE", "vocab": []}}']
)
def test_other_tokenizers_are_refused(folder, text) -> None:
    (folder / "tokenizer/tokenizer.json").write_bytes(text)
    with pytest.raises(ExportError, match=r"tokenizer\.json is not a CLIP byte-pair tokenizer"):
        resolve_checkpoint(str(folder))


def test_missing_tokenizer_is_named(folder) -> None:
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"the tokenizer is incomplete: accepted vocab\.json and merges\.txt"):
        resolve_checkpoint(str(folder))
