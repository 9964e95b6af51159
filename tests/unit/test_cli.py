"""sd-run as it is used: pictures come out, and whatever is wrong is one line and an exit code, with nothing left."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from sd_runtime import Pipeline
from sd_runtime.bundle.bundle import Bundle, find_exported
from sd_runtime.cli.run import main
from sd_runtime.engines.onnxruntime_ import library
from sd_runtime.engines.onnxruntime_.installation import check_loadable
from sd_runtime.errors import BundleError
from sd_runtime.images.metadata import Parameters, png_bytes, read_parameters
from sd_runtime.notices import warn

PROMPT = "a large yellow star on a blue background"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr."""
        (line,) = self.err.splitlines()
        assert line.startswith("sd-run: ")
        return line.removeprefix("sd-run: ")


SdRun = Callable[..., Outcome]


@pytest.fixture
def sd_run(
    demo_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pipe: Pipeline,
) -> SdRun:
    """sd-run in an empty folder, at two steps unless told otherwise, with a pipeline that is loaded only once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_LEAN_HOME", str(tmp_path.parent / "no-models"))
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, bundle, **options: pipe))
    monkeypatch.setattr(pipe, "close", lambda: None)

    def run(*arguments: str, model: str | None = str(demo_bundle), steps: str | None = "2") -> Outcome:
        model_flags = ["--model", model] if model is not None else []
        steps_flags = ["--steps", steps] if steps is not None else []
        code = main([*model_flags, *steps_flags, *arguments])
        return Outcome(code, *capsys.readouterr())

    return run


def pixels(path: str) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


# ---- pictures come out -----------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_picture(sd_run: SdRun) -> None:
    outcome = sd_run(PROMPT, "--seed", "3", steps=None)
    assert (outcome.code, outcome.out) == (0, "picture-0001.png\n")
    assert "load" in outcome.err and "denoise" in outcome.err and "total" in outcome.err
    told = read_parameters("picture-0001.png")
    assert (told.prompt, told.seed, told.num_inference_steps, told.width) == (PROMPT, 3, 25, 128)
    assert sd_run(PROMPT, "--quiet") == Outcome(0, "", "")
    assert files() == ["picture-0001.png", "picture-0002.png"]
    assert read_parameters("picture-0002.png").seed != 3


def test_quiet_mutes_notices(
    sd_run: SdRun, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(cls: type, bundle: object, **options: object) -> Pipeline:
        warn("the CPU is used instead")
        return pipe

    monkeypatch.setattr(Pipeline, "load", classmethod(load))
    assert sd_run(PROMPT, "--quiet").code == 0 and not caplog.records
    assert sd_run(PROMPT).code == 0 and len(caplog.records) == 1


def test_quiet_mutes_pythons_warnings_too(sd_run: SdRun, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(cls: type, bundle: object, **options: object) -> Pipeline:
        warnings.warn("a library's opinion", stacklevel=1)
        return pipe

    monkeypatch.setattr(Pipeline, "load", classmethod(load))
    assert sd_run(PROMPT, "--negative-prompt", "red", "--guidance-scale", "1", "--quiet") == Outcome(0, "", "")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert "sd-run: UserWarning: a library's opinion\n" in sd_run(PROMPT).err


def test_every_setting_arrives(sd_run: SdRun) -> None:
    flags = {
        "--negative-prompt": "red", "--guidance-scale": "3.5", "--guidance-rescale": "0.25", "--eta": "0.5",
        "--seed": "18446744073709551615", "--rng": "cuda", "--scheduler": "ddim", "--width": "72", "--height": "64",
        "--output": "{prompt}-{seed}.png",
    }  # fmt: skip
    outcome = sd_run(PROMPT, "--no-weighting", "--truncate", *[text for pair in flags.items() for text in pair])
    assert outcome.code == 0
    (name,) = files()
    assert name == "a-large-yellow-star-on-a-blue-background-18446744073709551615.png"
    told = read_parameters(name)
    assert (told.negative_prompt, told.guidance_scale, told.seed) == ("red", 3.5, 2**64 - 1)
    assert (told.rng, told.scheduler, told.width, told.height) == ("cuda", "DDIM", 72, 64)
    assert told.extra == {"Guidance rescale": "0.25", "Eta": "0.5", "Emphasis": "None", "Truncate": "77"}


def test_several_pictures_a_grid_and_their_settings(sd_run: SdRun) -> None:
    assert sd_run(PROMPT, "--num-images", "3", "--seed", "5", "--output", "{seed}.png", "--json").code == 0
    assert files() == ["5.json", "5.png", "6.json", "6.png", "7.json", "7.png"]
    assert json.loads(Path("6.json").read_text())["seed"] == 6
    assert sd_run(PROMPT, "--grid", "2x2", "--num-images", "3", "--seed", "5", "--output", "sheet.png").code == 0
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (256, 256)
        assert sheet.crop((0, 128, 128, 256)).tobytes() == pixels("7.png")
        assert sheet.getpixel((200, 200)) == (0, 0, 0)
    assert sd_run(PROMPT, "--grid", "1x2", "--seed", "5", "--output", "pair.png").code == 0
    assert sd_run("--from-image", "pair.png", "--output", "again.png", steps=None).code == 0
    assert pixels("pair.png") == pixels("again.png")


def test_a_picture_is_changed(sd_run: SdRun) -> None:
    assert sd_run(PROMPT, "--seed", "1", "--output", "a.png").code == 0
    outcome = sd_run("a green heart", "--image", "a.png", "--strength", "0.5", "--resize", "fit", "--output", "b.png")
    assert outcome.code == 0
    assert "encode image" in outcome.err
    assert read_parameters("b.png").extra["Denoising strength"] == "0.5"


def test_previews_grow_step_by_step(sd_run: SdRun) -> None:
    assert sd_run(PROMPT, "--preview", "steps.png", "--output", "a.png", "--scheduler", "ddim", steps="4").code == 0
    with Image.open("steps.png") as strip:
        assert strip.size == (4 * 64, 64)
        assert strip.crop((192, 0, 256, 64)).getextrema() != ((0, 0),) * 3


def test_a_learnt_word(sd_run: SdRun, tmp_path: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    monkeypatch.setattr(pipe.prompts, "inversions", {})
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "thing.safetensors")
    assert sd_run("a sks star", "--embedding", "sks=thing.safetensors", "--output", "a.png").code == 0
    assert "sks: " in read_parameters("a.png").extra["TI hashes"]
    monkeypatch.setattr(pipe.prompts, "inversions", {})
    outcome = sd_run("--from-image", "a.png", "--output", "b.png")
    assert outcome.code == 0
    assert "sd-run: not drawn as a.png was: TI hashes: sks: " in outcome.err


def test_list_and_help(sd_run: SdRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dpmpp_2m[_karras|_exponential]" in sd_run("--list-schedulers").out
    for flag, text in (("--help", "--prompts-file FILE"), ("--version", "sd-run 0.")):
        with pytest.raises(SystemExit) as end:
            main([flag])
        assert not end.value.code
        assert text in capsys.readouterr().out


# ---- it was asked for what cannot be ---------------------------------------------------------------------------------

BAD_FLAGS = [
    ((), "no prompt given; try: "),
    ((PROMPT, "another"), "unrecognized arguments: another; see sd-run --help"),
    ((PROMPT, "--step", "3"), "unrecognized arguments: --step 3"),
    ((PROMPT, "--steps", "0"), "--steps: got 0, accepted whole numbers from 1 to 1000"),
    ((PROMPT, "--steps", "1001"), "--steps: got 1001"),
    ((PROMPT, "--steps", "many"), "argument --steps: invalid int value: 'many'"),
    ((PROMPT, "--steps", "9" * 5000), "argument --steps: invalid int value"),
    ((PROMPT, "--guidance-scale", "-1"), "--guidance-scale: got -1.0, accepted numbers from 0 to 100"),
    ((PROMPT, "--guidance-scale", "nan"), "--guidance-scale: got nan"),
    ((PROMPT, "--guidance-rescale", "1.5"), "--guidance-rescale: got 1.5, accepted numbers from 0 to 1"),
    ((PROMPT, "--eta", "2"), "--eta: got 2.0, accepted numbers from 0 to 1"),
    (
        (PROMPT, "--eta", "0.5", "--scheduler", "euler"),
        "--eta for a sampler without one, as all but ddim and tcd: got",
    ),
    ((PROMPT, "--seed", str(2**64)), "--seed: got 18446744073709551616, accepted an integer from -2^63 to 2^64 - 1"),
    ((PROMPT, "--seed", "1.5"), "argument --seed: invalid int value"),
    ((PROMPT, "--seed", str(2**64 - 1), "--num-images", "2"), "--seed: got 18446744073709551616"),
    ((PROMPT, "--width", "100"), "--width: got 100, accepted multiples of 8 from 64 to 1024; nearest: 96"),
    ((PROMPT, "--height", "99999999999"), "--height: got 99999999999"),
    ((PROMPT, "--num-images", "0"), "--num-images: got 0, accepted whole numbers from 1 to 1000"),
    ((PROMPT, "--scheduler", "euler_b"), "--scheduler: got euler_b, accepted nearest: euler"),
    ((PROMPT, "--rng", "mps"), "argument --rng: invalid choice: 'mps'"),
    ((PROMPT, "--device", "tpu"), "argument --device: invalid choice: 'tpu'"),
    (
        (PROMPT, "--strength", "0.5"),
        "--strength without a picture to change: got 0.5; give the",
    ),
    (
        (PROMPT, "--resize", "fit"),
        "--resize without a picture to change: got fit; give the",
    ),
    ((PROMPT, "--image", "nowhere.png"), "picture: got nowhere.png, accepted a picture file (PNG, JPEG, WEBP)"),
    ((PROMPT, "--image", "."), "picture: got ., accepted a picture file"),
    ((PROMPT, "--image", "text.txt"), "picture: got text.txt, accepted a picture file"),
    ((PROMPT, "--image", "cut.png"), "picture: got cut.png, accepted undamaged files"),
    ((PROMPT, "--image", "dot.png", "--strength", "0"), "--strength: got 0.0, accepted more than 0"),
    ((PROMPT, "--image", "dot.png", "--strength", "0.1"), "--strength: got 0.1, accepted at least 0.5 at 2 steps"),
    ((PROMPT, "--embedding", "word"), "--embedding: got word, accepted WORD=FILE"),
    (
        (PROMPT, "--embedding", "word=nowhere.safetensors"),
        "textual inversion: got nowhere.safetensors, accepted",
    ),
    ((PROMPT, "--grid", "2"), "--grid: got 2, accepted ROWSxCOLS, such as 2x3"),
    ((PROMPT, "--grid", "0x3"), "--grid: got 0x3"),
    ((PROMPT, "--grid", "2x2", "--num-images", "5"), "--num-images: got 5, accepted at most 4 on a 2x2 grid"),
    ((PROMPT, "--output", "a.jpg"), "--output: got a.jpg, accepted names that end in .png"),
    ((PROMPT, "--output", "{sampler}.png"), "output pattern: got {sampler}.png"),
    ((PROMPT, "--output", "a.png", "--num-images", "2"), "output for 2 pictures: got a.png"),
    ((PROMPT, "--output", "nowhere/a.png"), "cannot write 'nowhere/a.png': No such file or directory; create the"),
    ((PROMPT, "--output", "text.txt/a.png"), "cannot write 'text.txt/a.png': Not a directory"),
    ((PROMPT, "--output", "a" * 300 + ".png"), "cannot write 'aaa"),
    ((PROMPT, "--output", "a\0.png"), "--output: got "),
    ((PROMPT, "--output", "dot.png"), "'dot.png' exists; choose another name, or allow it to be replaced"),
    ((PROMPT, "--output", "text.png", "--json"), "'text.json' exists"),
    ((PROMPT, "--output", "folder.png"), "cannot write 'folder.png': Is a directory"),
    ((PROMPT, "--preview", "dot.png"), "'dot.png' exists"),
    ((PROMPT, "--preview", "steps.jpg"), "--preview: got steps.jpg"),
    ((PROMPT, "--preview", "a.png", "--output", "a.png"), "--preview: got a.png, accepted a name of its own"),
    (("--from-image", "nowhere.png"), "picture: got nowhere.png"),
    (("--from-image", "dot.png"), "picture: got dot.png, accepted a picture with generation parameters"),
    (("--prompts-file", "nowhere.txt"), "prompts file: got nowhere.txt, accepted a text file; there is no such file"),
    (("--prompts-file", "broken"), "prompts file: got broken, accepted a text file; it is a link to 'nowhere'"),
    ((PROMPT, "--image", "broken"), "picture: got broken, accepted a picture file (PNG, JPEG, WEBP); it is a link"),
    (("--from-image", "broken"), "picture: got broken, accepted a picture file (PNG, JPEG, WEBP); it is a link to"),
    ((PROMPT, "--image", "thread.png"), "picture 'thread.png' is too long and thin: got 1x60000000 pixels"),
    (("--prompts-file", "."), "prompts file: got ., accepted a text file; it is a folder"),
    (("--prompts-file", "dot.png"), "prompts file: got dot.png, accepted text in UTF-8"),
    (("--prompts-file", "blank.txt"), "prompts file: got blank.txt without a prompt, accepted one prompt a line"),
    ((PROMPT, "--prompts-file", "text.txt"), "a prompt and --prompts-file: accepted one of them"),
    (("--prompts-file", "text.txt", "--output", "{seed}.png"), "output pattern: got {seed}.png, accepted {seed} where"),
    ((os.fsdecode(b"caf\xe9"),), "prompt: got U+DCE9 at character 3, accepted Unicode text without lone surrogates"),
    ((PROMPT, "--negative-prompt", os.fsdecode(b"\xff")), "--negative-prompt: got "),
    (("word " * 20_000,), "prompt: got 80000 tokens in 1067 chunks, accepted at most 16 chunks"),
    (("x" * 100_000,), "prompt: got "),
    (("(" * 200 + "star",), "prompt: open brackets"),
    ((PROMPT, "--image", os.fsdecode(b"\xff.png")), "picture: got \\udcff.png, accepted a picture file"),
]


@pytest.fixture
def surroundings(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "whole.png").unlink()
    (tmp_path / "text.txt").write_text("a star\n")
    (tmp_path / "text.json").write_text("{}")
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken").symlink_to("nowhere")
    header = (tmp_path / "dot.png").read_bytes()
    size = struct.pack(">II", 1, 60_000_000)
    chunk = b"IHDR" + size + header[24:29]
    (tmp_path / "thread.png").write_bytes(header[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[33:])


@pytest.mark.parametrize(("arguments", "complaint"), BAD_FLAGS, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_refused(
    sd_run: SdRun, surroundings: None, arguments: tuple[str, ...], complaint: str
) -> None:
    before = files()
    flags = {} if "--steps" not in arguments else {"steps": None}
    outcome = sd_run(*arguments, **flags)
    assert outcome.complaint.startswith(complaint)
    assert len(outcome.complaint) <= 2000
    assert (outcome.code, outcome.out) == (2, "")
    assert files() == before


# ---- it failed -------------------------------------------------------------------------------------------------------


def test_unknown_and_missing_models(sd_run: SdRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = sd_run(PROMPT, model="nothing/such")
    assert outcome.code == 1
    assert outcome.complaint.startswith(
        "unknown model: got nothing/such, accepted a bundle's folder; sd-export --model"
    )
    assert "no model has been exported to " in sd_run(PROMPT, model=None).complaint
    assert "make one with: sd-export --model demo" in sd_run(PROMPT, model=None).complaint
    assert sd_run(PROMPT, model=os.fsdecode(b"\xff")).complaint.startswith("unknown model: got ")
    assert sd_run(PROMPT, model="a\0b").code == 1
    assert files() == []


@pytest.fixture
def damaged(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("damaged") / "demo"))


def test_fault_03_damaged_bundles(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real loading: truncated, flipped, gone; nothing is drawn."""
    monkeypatch.chdir(tmp_path)

    def complaint() -> str:
        assert main([PROMPT, "--model", str(damaged), "--device", "cpu"]) == 1
        return Outcome(1, *capsys.readouterr()).complaint

    weights = damaged / "unet" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "unet/model.safetensors in bundle " in complaint() and "is damaged: got SHA-256 " in complaint()
    weights.write_bytes(whole[:1000])
    assert "truncated or changed: unet/model.safetensors (1000 bytes, declared " in complaint()
    weights.unlink()
    assert "missing unet/model.safetensors; export it again, from demo: sd-export --model " in complaint()
    (damaged / "manifest.json").write_text("{")
    assert "manifest.json is not valid JSON" in complaint()
    assert files() == []


def test_no_engine_library(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(library, "check_loadable", partial(check_loadable, [str(tmp_path)]))
    code = main([PROMPT, "--model", str(demo_bundle)])
    complaint = Outcome(code, *capsys.readouterr()).complaint
    assert code == 1
    assert complaint.startswith("no engine library is installed: accepted onnxruntime")
    assert 'pip install "sd-lean[cpu]"' in complaint
    assert files() == []


def test_a_folder_that_takes_no_files(sd_run: SdRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for flags in ((), ("--output", "a.png")):
        outcome = sd_run(PROMPT, *flags)
        assert outcome.code == 1
        assert "Permission denied; choose a folder that you may write to" in outcome.complaint


def test_a_disk_that_is_full(sd_run: SdRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sd_runtime.images.files._write_and_sync", full)
    outcome = sd_run(PROMPT, "--output", "a.png")
    assert outcome.code == 1
    assert outcome.complaint == "cannot write 'a.png': No space left on device; free space on that disk"
    assert files() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full")
def test_stdout_on_a_full_disk_stops_no_drawing(demo_bundle: Path, tmp_path: Path) -> None:
    """Also that the module can be run."""
    (tmp_path / "prompts.txt").write_text("a star\na ring\n")
    command = [
        sys.executable, "-m", "sd_runtime.cli.run", "--prompts-file", str(tmp_path / "prompts.txt"), "--device", "cpu",
        "--model", str(demo_bundle), "--steps", "1", "--output", f"{tmp_path}/{{prompt}}-{{index}}.png",
    ]  # fmt: skip
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    timings, complaint = done.stderr.splitlines()
    assert timings.startswith("load")
    assert complaint == "sd-run: stdout cannot be written: No space left on device"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a-ring-1.png", "a-star-0.png"]


def test_a_preview_takes_no_other_files_place(sd_run: SdRun) -> None:
    assert sd_run(PROMPT, "--output", "a.png").code == 0
    Path("link.png").symlink_to("a.png")
    Path("prompts.png").write_text("a star")
    here, told = Path.cwd(), Path("a.png").read_bytes()
    for flags in (
        ("--num-images", "2", "--output", "b{index}.png", "--preview", str(here / "b0.png"), PROMPT),
        ("--output", "b.png", "--preview", "./../" + here.name + "/b.png", PROMPT),
        ("--output", "b.png", "--image", "a.png", "--preview", str(here / "a.png"), PROMPT),
        ("--output", "b.png", "--image", "link.png", "--preview", "a.png", PROMPT),
        ("--output", "b.png", "--from-image", "a.png", "--preview", str(here / "a.png")),
        ("--output", "b{index}.png", "--prompts-file", "prompts.png", "--preview", "prompts.png"),
    ):
        outcome = sd_run("--overwrite", *flags)
        assert (outcome.code, "accepted a name of its own" in outcome.complaint) == (2, True)
    assert files() == ["a.png", "link.png", "prompts.png"]
    assert Path("a.png").read_bytes() == told


def test_a_preview_replaces_an_older_one_only(sd_run: SdRun) -> None:
    assert sd_run(PROMPT, "--preview", "steps.png", "--output", "a.png").code == 0
    assert sd_run(PROMPT, "--preview", "steps.png", "--output", "b.png").code == 0
    assert sd_run(PROMPT, "--preview", "a.png", "--output", "c.png").code == 2


def test_names_that_are_no_text_are_files_all_the_same(sd_run: SdRun) -> None:
    """A name in another encoding reaches the disk unchanged; on the terminal it is escaped."""
    outcome = sd_run(PROMPT, "--output", os.fsdecode(b"caf\xe9.png"))
    assert (outcome.code, outcome.out) == (0, "caf\\udce9.png\n")
    assert [os.fsencode(name) for name in files()] == [b"caf\xe9.png"]


@pytest.mark.parametrize("spelling", ["absolute", "relative", "~", "name"])
def test_fault_44_a_picture_that_names_a_path_as_its_model(
    sd_run: SdRun, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """What lies there is not opened: which file is, is the user's to say."""
    monkeypatch.setattr(Bundle, "open", lambda root: pytest.fail(f"{root} was opened"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "evil").symlink_to(demo_bundle)
    names = {"absolute": str(demo_bundle), "relative": "./evil", "~": "~/evil", "name": "evil"}
    own = Parameters("x", seed=1, model=names[spelling], version="sd-lean 9")
    (tmp_path / "a.png").write_bytes(png_bytes(Image.new("RGB", (64, 64)), own))
    outcome = sd_run("--from-image", "a.png", "--output", "b.png", model=None, steps=None)
    assert outcome.code == 1
    assert outcome.complaint.startswith(
        f"the picture's model is not here: got {names[spelling]}; name an exported model"
    )


def test_fault_44_the_users_own_path_counts(sd_run: SdRun, demo_bundle: Path, tmp_path: Path) -> None:
    own = Parameters("x", seed=1, model="/nowhere", version="sd-lean 9")
    (tmp_path / "a.png").write_bytes(png_bytes(Image.new("RGB", (64, 64)), own))
    assert sd_run("--from-image", "a.png", "--output", "b.png", steps=None).code == 0


def test_fault_44_names_of_exported_bundles_are_found(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_LEAN_HOME", str(tmp_path))
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "demo").symlink_to(demo_bundle)
    for name in ("demo", "owner/demo"):
        assert find_exported(name) == tmp_path / "bundles" / "demo"
    for name in ("..", ".", "", "/", "../bundles", str(tmp_path / "elsewhere")):
        with pytest.raises(BundleError, match="unknown model"):
            find_exported(name)
