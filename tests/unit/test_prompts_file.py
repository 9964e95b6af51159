"""Prompts files: what a line may say, and that a run that was cut short is taken up where it ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from sd_runtime import Pipeline, UsageError
from sd_runtime.cli.run import main
from sd_runtime.cli.settings import Settings, read_prompts_file
from sd_runtime.images.metadata import read_parameters

STAR, RING = "a large yellow star on a blue background", "a small red ring on a white background"


def lines_of(folder: Path, text: str | bytes) -> list[tuple[str, Settings]]:
    path = folder / "prompts.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts_file(path)


def test_a_line_is_a_prompt_or_an_object(tmp_path: Path) -> None:
    text = '\ufeffa star\r\n\n  a ring  \n{"prompt": "{}", "seed": 3, "guidance_scale": 4}\n'
    assert lines_of(tmp_path, text) == [
        ("prompts.txt line 1", Settings(prompt="a star")),
        ("prompts.txt line 3", Settings(prompt="a ring")),
        ("prompts.txt line 4", Settings(prompt="{}", options={"seed": 3, "guidance_scale": 4.0})),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", "steps": 3}',
            "prompts.txt line 2: unknown steps: accepted prompt, image, grid, neg",
        ),
        ('{"prompt": 3}', "prompts.txt line 2: prompt: got 3, accepted text"),
        ('{"prompt": "a", "seed": 1.5}', "prompts.txt line 2: seed: got 1.5, accepted an integer"),
        ('{"prompt": "a", "seed": true}', "prompts.txt line 2: seed: got True, accepted an integer"),
        ('{"prompt": "a", "rng": "mps"}', "prompts.txt line 2: rng: got mps, accepted cpu, cuda"),
        ('{"prompt": "a", "prompt": "b"}', "prompts.txt line 2: duplicate key: got prompt"),
        ('{"prompt": "a", "eta": NaN}', "prompts.txt line 2: got NaN, accepted finite numbers"),
        ('{"prompt": "a"', "prompts.txt line 2 is not valid JSON"),
        ("{" * 100_000, "prompts.txt line 2 is not valid JSON"),
    ],
)
def test_lines_that_cannot_be(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lines_of(tmp_path, f"a star\n{line}\n")


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        lines = lines_of(folder, data)
    except UsageError:
        return
    assert all(settings.prompt is None or settings.prompt.strip() for _, settings in lines)


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: Pipeline) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, bundle, **options: pipe))
    monkeypatch.setattr(pipe, "close", lambda: None)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".txt")


def draw(bundle: Path, *flags: str) -> int:
    return main(["--prompts-file", "prompts.txt", "--model", str(bundle), "--steps", "2", *flags])


def test_lines_over_flags_over_the_model(folder: Path, demo_bundle: Path) -> None:
    lines = [STAR, json.dumps({"prompt": RING, "num_inference_steps": 3, "num_images_per_prompt": 2, "width": 64})]
    Path("prompts.txt").write_text("\n".join(lines))
    assert draw(demo_bundle, "--seed", "5", "--negative-prompt", "red") == 0
    assert files(folder) == ["prompts-0000.png", "prompts-0001.png", "prompts-0002.png"]
    told = [read_parameters(name) for name in files(folder)]
    assert [t.prompt for t in told] == [STAR, RING, RING]
    assert [t.seed for t in told] == [5, 5, 6]
    assert [t.num_inference_steps for t in told] == [2, 3, 3]
    assert [t.width for t in told] == [128, 64, 64]
    assert {t.negative_prompt for t in told} == {"red"}


def test_only_what_is_missing_is_drawn(folder: Path, demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also without a seed; --json fills in what is missing, too; nothing that is done is touched."""
    Path("prompts.txt").write_text(f"{STAR}\n{RING}\n")
    flags = ("--num-images", "2", "--output", "{index}.png")
    assert draw(demo_bundle, *flags) == 0
    Path("1.png").unlink()
    kept = {name: Path(name).stat().st_mtime_ns for name in files(folder)}
    capsys.readouterr()
    assert draw(demo_bundle, *flags, "--json") == 0
    assert capsys.readouterr().out == "1.png\n"
    assert {name: Path(name).stat().st_mtime_ns for name in kept} == kept
    assert files(folder) == [f"{i}.{kind}" for i in range(4) for kind in ("json", "png")]
    assert draw(demo_bundle, *flags, "--json") == 0
    assert capsys.readouterr().out == ""


def test_other_pictures_are_not_taken_for_done(
    folder: Path, demo_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that changed, a seed that changed, a foreign file: named, and replaced only when told."""
    Path("prompts.txt").write_text(f"{STAR}\n{RING}\n")
    flags = ("--output", "{index}.png")
    assert draw(demo_bundle, *flags, "--seed", "1") == 0
    Path("prompts.txt").write_text(f"{STAR}\n{RING} and more\n")
    for other in ((), ("--seed", "1"), ("--seed", "2")):
        assert draw(demo_bundle, *flags, *other) == 2
        assert "exists and is not the picture asked for; choose another --output" in capsys.readouterr().err
    assert read_parameters("1.png").prompt == RING
    assert draw(demo_bundle, *flags, "--seed", "1", "--overwrite") == 0
    assert capsys.readouterr().out == "1.png\n"
    Image.new("RGB", (8, 8)).save("0.png")
    assert draw(demo_bundle, *flags, "--seed", "1") == 2
    assert "prompts.txt line 1: '0.png' exists" in capsys.readouterr().err


def test_sheets_and_changed_pictures_are_resumed_too(
    folder: Path, demo_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "red").save("start.PNG")
    line = {"prompt": STAR, "image": "start.PNG", "strength": 0.9, "grid": "1x2"}
    Path("prompts.txt").write_text(f"{json.dumps(line)}\n{json.dumps(line | {'strength': 0.6})}\n")
    assert draw(demo_bundle, "--seed", "1", "--output", "{index}.png") == 0
    Path("0.png").unlink()
    capsys.readouterr()
    assert draw(demo_bundle, "--seed", "1", "--output", "{index}.png") == 0
    assert capsys.readouterr().out == "0.png\n"
    Image.new("RGB", (64, 64), "blue").save("start.PNG")  # another start: another picture
    assert draw(demo_bundle, "--seed", "1", "--output", "{index}.png") == 2


def test_a_sheet_of_fewer_pictures_is_another_one(folder: Path, demo_bundle: Path) -> None:
    Path("prompts.txt").write_text(f"{STAR}\n")
    flags = ("--seed", "1", "--output", "sheet-{index}.png", "--grid", "2x2")
    for count, code in (("3", 0), ("3", 0), ("4", 2), ("2", 2)):
        assert draw(demo_bundle, *flags, "--num-images", count) == code
    assert draw(demo_bundle, *flags, "--overwrite") == 0
    assert draw(demo_bundle, *flags, "--num-images", "4") == 0
    assert "Grid pictures" not in read_parameters("sheet-0.png").extra


@pytest.mark.parametrize("kept", [5000, -16, -12])
def test_a_picture_that_was_cut_off_is_not_done(
    folder: Path, demo_bundle: Path, capsys: pytest.CaptureFixture[str], kept: int
) -> None:
    Path("prompts.txt").write_text(f"{STAR}\n")
    assert draw(demo_bundle, "--seed", "1") == 0
    whole = Path("prompts-0000.png").read_bytes()
    Path("prompts-0000.png").write_bytes(whole[:kept])
    assert read_parameters("prompts-0000.png").prompt == STAR
    assert draw(demo_bundle, "--seed", "1") == 2
    assert "exists and is not the picture asked for" in capsys.readouterr().err
    assert draw(demo_bundle, "--seed", "1", "--overwrite") == 0
    assert Path("prompts-0000.png").read_bytes() == whole


def test_a_preview_of_the_run_before_is_in_nobodys_way(folder: Path, demo_bundle: Path) -> None:
    Path("prompts.txt").write_text(f"{STAR}\n{RING}\n")
    flags = ("--seed", "1", "--preview", "steps.png")
    assert draw(demo_bundle, *flags) == 0
    Path("prompts-0001.png").unlink()
    assert draw(demo_bundle, *flags) == 0
    assert files(folder) == ["prompts-0000.png", "prompts-0001.png", "steps.png"]


BAD_LINES: list[tuple[dict[str, Any] | str, str]] = [
    ({"prompt": RING, "width": 100}, "prompts.txt line 2: width: got 100, accepted multiples of 8"),
    ({"prompt": RING, "scheduler": "x"}, "prompts.txt line 2: scheduler: got x"),
    (
        {"prompt": RING, "eta": 0.5},
        "prompts.txt line 2: --eta for a sampler without one, as all but ddim and tcd",
    ),
    ({"seed": 3}, "prompts.txt line 2: prompt: got none"),
    ({"prompt": RING, "image": "no.png"}, "prompts.txt line 2: picture: got no.png"),
    ({"prompt": RING, "strength": 0.5}, "prompts.txt line 2: --strength without a picture to change: got 0.5"),
    ({"prompt": RING, "num_inference_steps": 0}, "prompts.txt line 2: num_inference_steps: got 0"),
    ('{"prompt": "\\ud800"}', "prompts.txt line 2: prompt: got U+D800"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=lambda value: str(value)[:40])
def test_a_bad_line_is_named_before_anything_is_drawn(
    folder: Path, demo_bundle: Path, line: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text(f"{STAR}\n{line if isinstance(line, str) else json.dumps(line)}\n")
    assert draw(demo_bundle) == 2
    assert capsys.readouterr().err.startswith(f"sd-run: {message}")
    assert files(folder) == []


LONG = "a " * (75 * 16 + 1)  # 17 chunks; the demo's networks take 16


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("(" * 200 + " star", "prompt: open brackets: got 101"),
        ("a (star:1000000)", "prompt: weight: got 1000000.0"),
        (LONG, "prompt: got 1201 tokens in 17 chunks, accepted at most 16 chunks of 75 tokens; shorten"),
        ({"prompt": STAR, "negative_prompt": LONG}, "negative_prompt: got 1201 tokens in 17 chunks"),
        ("a star <lora:x:0.8>", "prompt: not understood: <lora:x:0.8> (adds a LoRA): accepted words"),
        ({"prompt": STAR, "negative_prompt": "[a:b:0.5]"}, "negative_prompt: not understood: [a:b:0.5] (changes words"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_fault_49_every_line_is_tokenized_before_the_first_is_drawn(
    folder: Path, demo_bundle: Path, line: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    Path("prompts.txt").write_text(f"{STAR}\n{text}\n{RING}\n")
    assert draw(demo_bundle) == 2
    (complaint,) = capsys.readouterr().err.splitlines()
    assert complaint.startswith(f"sd-run: prompts.txt line 2: {message}")
    assert files(folder) == []


def test_fault_49_the_longest_prompt_that_passes_is_drawn(folder: Path, demo_bundle: Path) -> None:
    Path("prompts.txt").write_text(f"{LONG[:-2]}\n")
    assert draw(demo_bundle) == 0
    assert files(folder) == ["prompts-0000.png"]


def test_what_has_no_effect_is_said_once_before_anything_is_drawn(
    folder: Path, demo_bundle: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Path("prompts.txt").write_text("\n".join([STAR, json.dumps({"prompt": RING, "guidance_scale": 1}), STAR] * 2))
    assert draw(demo_bundle, "--negative-prompt", "red") == 0
    notice, timings = capsys.readouterr().err.splitlines()
    assert notice == (
        "sd-run: prompts.txt line 2: --negative-prompt is not used: with a --guidance-scale of 1 guidance is off, "
        "it takes more than 1"
    )
    assert timings.startswith("load ") and not caplog.records
    assert [read_parameters(name).negative_prompt for name in files(folder)] == ["red", "", "red"] * 2
    assert draw(demo_bundle, "--negative-prompt", "red", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_a_line_that_fails_keeps_what_was_drawn(
    folder: Path, demo_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture whose header is whole, and not the rest."""
    Image.effect_noise((64, 64), 50).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:2000])
    Path("whole.png").unlink()
    Path("prompts.txt").write_text(f"{STAR}\n{json.dumps({'prompt': RING, 'image': 'cut.png'})}\n{RING}\n")
    assert draw(demo_bundle) == 2
    assert capsys.readouterr().err.startswith("sd-run: prompts.txt line 2: picture: got cut.png")
    assert files(folder) == ["cut.png", "prompts-0000.png"]


KILLED = "import sys; from sd_runtime.cli.run import main; sys.exit(main())"


def test_killed_at_any_moment_nothing_is_lost(demo_bundle: Path, tmp_path: Path) -> None:
    """kill -9, twice, at a picture's birth: what is there is whole, and the next run draws the rest, each once."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"{STAR} {i}" for i in range(16)))
    command = [
        sys.executable, "-c", KILLED, "--prompts-file", str(tmp_path / "prompts.txt"), "--model", str(demo_bundle),
        "--device", "cpu", "--steps", "2", "--seed", "1", "--output", f"{tmp_path}/{{index}}.png", "--json",
    ]  # fmt: skip

    def pictures() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}

    drawn: dict[str, int] = {}
    for least in (2, 5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while len(pictures()) < least and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
        assert drawn.items() <= pictures().items()
        drawn = pictures()
        assert least <= len(drawn) < 16
    for name in drawn:
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image).shape == (128, 128, 3)
    last = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(last.stdout.splitlines()) == 16 - len(drawn)
    assert drawn.items() <= pictures().items()
    assert all((tmp_path / f"{i}.json").exists() for i in range(16))
    assert [read_parameters(tmp_path / f"{i}.png").prompt for i in range(16)] == [f"{STAR} {i}" for i in range(16)]
