"""Small files that would make a bundle which nothing can draw with are refused before the weights are looked at."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from sd_export.source import resolve_checkpoint, tokenizer, with_vae
from sd_runtime.errors import ExportError

SCHEDULER, CONFIG = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"


def refused(folder: Path) -> str:
    """Why a checkpoint is refused; without weights, so that nothing can have been done with them."""
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    with pytest.raises(ExportError) as caught:
        resolve_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def name_scheduler(folder: Path, name: object) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler])
def test_schedulers_into_which_diffusers_writes_minus_infinity(folder, scheduler) -> None:
    scheduler().save_pretrained(folder / "scheduler")
    name_scheduler(folder, scheduler.__name__)
    assert "-Infinity" in (folder / SCHEDULER).read_text()
    assert resolve_checkpoint(str(folder)).configs["scheduler"]["lambda_min_clipped"] == -math.inf


def separate(folder: Path) -> None:
    """The tokenizer as vocab.json and merges.txt."""
    (folder / "tokenizer/tokenizer.json").unlink()
    for name, content in tokenizer.clip().items():
        (folder / "tokenizer" / name).write_bytes(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"scheduler_config\.json: _class_name: accepted DDIMScheduler, .*; change scheduler/"),
        ('{"_class_name": "NoSuchScheduler"}', r"_class_name: got NoSuchScheduler, accepted DDIMScheduler, "),
        ('{"_class_name": ["DDIMScheduler"]}', r"_class_name: got \['DDIMScheduler'\], accepted DDIMScheduler, "),
        ('{"_class_name": "DDIMScheduler", "beta_start": "low"}', r"DDIMScheduler: beta_start: got low, accepted"),
        ('{"_class_name": "DDIMScheduler", "clip_sample": true}', r"DDIMScheduler: clip_sample: got True, accepted"),
        (f'{{"_class_name": "LCMScheduler", "timestep_scaling": 1{"0" * 400}}}', r"cannot be understood \(Overflow"),
        ("{", r"scheduler_config\.json is not valid JSON"),
    ],
)
def test_schedulers(folder, text, message) -> None:
    (folder / SCHEDULER).write_text(text)
    name_scheduler(folder, json.loads(text).get("_class_name") if text != "{" else None)
    assert re.search(message, refused(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"tokenizer_config\.json: model_max_length: got none, accepted 77, as many as the text encoder"),
        ('{"model_max_length": "77"}', r"model_max_length: got 77, accepted 77"),
        (
            '{"model_max_length": 1000000000000000019884624838656}',
            r"model_max_length: got 1000000000000000019884624838656",
        ),
        ("{", r"tokenizer_config\.json is not valid JSON"),
        ("[]", r"tokenizer_config\.json: got list, accepted a JSON object"),
        ('{"model_max_length": 77, "bos_token": {"content": 5}}', r"tokenizer/ cannot be understood \(TypeError"),
    ],
)
def test_tokenizer_configs(folder, text, message) -> None:
    (folder / CONFIG).write_text(text)
    assert re.search(message, refused(folder))


def test_a_missing_tokenizer_config(folder) -> None:
    (folder / CONFIG).unlink()
    assert "model_max_length: got none, accepted 77" in refused(folder)


@pytest.mark.parametrize(("name", "text"), [("vocab.json", "{"), ("vocab.json", "{}"), ("merges.txt", "a b c\n")])
def test_vocabularies(folder, name, text) -> None:
    separate(folder)
    (folder / "tokenizer" / name).write_text(text)
    assert re.search(rf"{name}|tokenizer: vocabulary", refused(folder))


@pytest.mark.parametrize("text", ["{}", '{"a": 1}', "{"])
def test_tokenizer_json_beside_a_good_vocabulary(folder, text) -> None:
    """It is what transformers and the runtime would read."""
    separate(folder)
    (folder / "tokenizer/tokenizer.json").write_text(text)
    assert "tokenizer.json is not a CLIP byte-pair tokenizer" in refused(folder)


def test_tokenizer_json_without_added_tokens(folder) -> None:
    path = folder / "tokenizer/tokenizer.json"
    document = json.loads(path.read_text())
    del document["added_tokens"]
    path.write_text(json.dumps(document))
    assert "tokenizer.json is not a CLIP byte-pair tokenizer" in refused(folder)


@pytest.mark.parametrize("name", ["", "model_index.json", "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("function", ["stat", "open"])
def test_what_may_not_be_read_is_named(folder, monkeypatch, name, function) -> None:
    """Permissions do not stop the superuser, so the refusal is made up."""
    forbidden, allowed = folder / name, getattr(Path, function)

    def refuse(path: Path, *args: object, **kwargs: object) -> object:
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path, *args, **kwargs)

    if function == "open" and not name:
        pytest.skip("a folder is not opened")
    monkeypatch.setattr(Path, function, refuse)
    message = f"{re.escape(str(forbidden))} cannot be read \\(Permission denied\\)"
    with pytest.raises(ExportError, match=message):
        resolve_checkpoint(str(folder))


def test_a_vae_that_may_not_be_read_is_named(tiny, folder, monkeypatch) -> None:
    checkpoint = resolve_checkpoint(str(tiny.folder))
    monkeypatch.setattr(
        Path, "exists", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", "x"))
    )
    with pytest.raises(ExportError, match=r"x cannot be read \(Permission denied\)"):
        with_vae(checkpoint, str(folder))
