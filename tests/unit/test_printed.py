"""Whatever text a file brings, what is printed of it is one line in which nothing acts."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_runtime import Pipeline
from sd_runtime.cli.run import main
from sd_runtime.errors import SDError, UsageError, one_line, printable
from sd_runtime.notices import warn

ACTS = ("\x1b[2J", "\x1b]0;t\x07", "\n", "\r", "\x85", "\u2028", "\u202e", "\u2066", "\u200b", "\x9b31m", "\x00")
PIECES = st.sampled_from([*ACTS, "\ud800", "a", " ", "<lora:x:1>", "日", '"', "Steps: 4, "])
HOSTILE = st.lists(PIECES, min_size=1, max_size=6).map("".join)
RELAXED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.text())
@example("".join(ACTS))
def test_fault_43_printable_text_is_one_line(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text) == text or not text.isprintable()
    assert one_line(text, 10).isprintable() and len(one_line(text, 10)) <= 10


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_fault_43_errors_are_one_line(what: str, got: str, accepted: str, remedy: str) -> None:
    for error in (SDError(what), UsageError(what, got=got, accepted=accepted, remedy=remedy)):
        assert str(error).isprintable()


@given(HOSTILE)
def test_fault_43_notices_are_one_line(text: str) -> None:
    import logging

    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger("sd_runtime").addHandler(handler)
    try:
        warn(f"{text} %s {text}")
    finally:
        logging.getLogger("sd_runtime").removeHandler(handler)
    (line,) = heard.getvalue().removesuffix("\n").split("\n")
    assert line.isprintable()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: Pipeline) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, bundle, **options: pipe))
    monkeypatch.setattr(pipe, "close", lambda: None)
    yield tmp_path


def printed(*arguments: str) -> tuple[int, list[str]]:
    """What sd-run prints, line by line, as a terminal takes it."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*arguments, "--width", "64", "--height", "64", "--steps", "1", "--overwrite"])
    text = out.getvalue() + err.getvalue()
    lines = text.removesuffix("\n").split("\n")
    for line in lines:
        assert line.isprintable(), line
    return code, lines


def picture(path: str, **texts: str) -> None:
    chunks = PngInfo()
    for key, value in texts.items():
        chunks.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(path, "PNG", pnginfo=chunks)


@RELAXED
@given(HOSTILE.filter(lambda text: "\ud800" not in text and "\x00" not in text))
def test_fault_43_a_pictures_text(folder: Path, demo_bundle: Path, text: str) -> None:
    """In every place of every format that is read, and where a program is only named."""
    quoted = json.dumps(text, ensure_ascii=False)
    a1111 = (
        f"a {text} cat\nSteps: {quoted}, Sampler: {quoted}, Seed: 1, Model: {quoted}, odd: {quoted}, Version: {quoted}"
    )
    swarm = {"prompt": f"a {text}", "model": text, "sampler": text, "scheduler": text, text: text, "width": text}
    graph = {"1": {"class_type": text, "inputs": {}}, text: {"class_type": "KSampler", "inputs": text}}
    for texts in (
        {"parameters": a1111},
        {"parameters": json.dumps({"sui_image_params": swarm})},
        {"parameters": json.dumps({text: text})},
        {"prompt": json.dumps(graph)},
        {"Software": f"NovelAI {text}"},
    ):
        picture("a.png", **texts)
        code, lines = printed("--from-image", "a.png", "--model", str(demo_bundle), "--output", "b.png")
        assert code in (0, 2)
        assert len(lines) <= 5, lines


@RELAXED
@given(HOSTILE.filter(lambda text: not {"\x00", "/"} & set(text)))
def test_fault_43_names_of_files(folder: Path, demo_bundle: Path, text: str) -> None:
    """They name the prompts file, and by it the pictures; a picture to repeat; a model; a word."""
    name = f"x{text.replace('<lora:x:1>', '')}".replace("\ud800", "\udcff")
    Path(f"{name}.txt").write_bytes(b"a star\n")
    model = ("--model", str(demo_bundle))
    code, lines = printed("--prompts-file", f"{name}.txt", *model)
    assert (code, len(lines)) == (0, 2)
    for drawn in Path().glob("*.png"):
        drawn.unlink()
    Path(f"{name}.txt").write_bytes(b'a star\n{"prompt": 3}\n')
    code, (line,) = printed("--prompts-file", f"{name}.txt", *model)
    assert code == 2 and "line 2: prompt: got 3" in line
    for arguments in (
        ("--from-image", f"{name}.txt", *model),
        ("--image", f"{name}.txt", "a star", *model),
        ("--embedding", f"{text}={name}.safetensors", "a star", *model),
        ("--model", name, "a star"),
        ("--preview", f"{name}.txt", "a star", *model),
        (f"a star {text}", "--scheduler", text, *model),
        (f"--x{text}".replace(" ", ""), *model),
    ):
        code, (line,) = printed(*arguments)
        assert code in (1, 2)


@RELAXED
@given(HOSTILE)
def test_fault_43_lines_of_a_prompts_file(folder: Path, demo_bundle: Path, text: str) -> None:
    lines: list[Any] = [{text: 1}, {"prompt": text, "scheduler": text}, {"prompt": "a", "image": text}, {"grid": text}]
    for line in lines:
        Path("prompts.txt").write_text(json.dumps(line))
        code, (complaint,) = printed("--prompts-file", "prompts.txt", "--model", str(demo_bundle))
        assert code == 2 and complaint.startswith("sd-run: prompts.txt line 1: ")


def test_fault_43_warnings_and_tracebacks(
    folder: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, pipe: Pipeline
) -> None:
    import warnings

    def load(cls: type, bundle: object, **options: object) -> Pipeline:
        warnings.simplefilter("default")
        warnings.warn("a file says \x1b[2J\n\u202e", stacklevel=1)
        return pipe

    monkeypatch.setattr(Pipeline, "load", classmethod(load))
    arguments = ("a star", "--model", str(demo_bundle), "--output", "b.png")
    assert r"sd-run: UserWarning: a file says \x1b[2J\n\u202e" in printed(*arguments)[1]
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, bundle, **options: 1 / 0 if bundle else None))
    monkeypatch.setenv("SD_DEBUG", "1")
    code, lines = printed(*arguments)
    assert code == 1 and lines[0].startswith("Traceback") and "ZeroDivisionError" in lines[-1]
    assert os.environ["SD_DEBUG"]
