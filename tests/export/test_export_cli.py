"""sd-export as its users meet it: help, progress, one-line errors, exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sd_export import exporter as stages
from sd_export.cli import main
from sd_export.progress import Progress, describe_size

IMPORTS = """
import sys
from sd_export.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
loaded = {"torch", "onnx", "onnx_ir", "numpy", "diffusers", "transformers", "filelock"} & set(sys.modules)
sys.exit(f"loaded {loaded}" if loaded else 0)
"""


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sd-export --model demo" in done.stdout
    assert time.monotonic() - start < 2  # 0.1 s on an idle machine


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: --model; see sd-export --help"),
        (["--model", "demo", "--precision", "int8"], 2, "argument --precision: invalid choice"),
        (["--model", "demo", "--components", "unet,vae"], 2, "components: got unet,vae, accepted text_encoder"),
        (["--model", "demo", "--components", ""], 2, "components: got "),
        (["--model", "demo", "--revision", "main"], 2, "revision: got main, accepted only together with a hub id"),
        (["--model", "no/such/folder"], 2, "model: got no/such/folder, accepted demo, a folder"),
        (["--model", "a\ud800"], 2, r"model: got a\ud800, accepted demo, a folder"),
        (["--mod", "demo"], 2, "required: --model"),
    ],
)
def test_usage_errors(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sd-export: ")
    assert message in err
    assert err.count("\n") == 1


def test_failures_exit_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--model", "demo", "--output", str(tmp_path / "file"), "--force", "--quiet"]) == 1
    assert "exists and is not a bundle" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["n" * 300, f"{'n' * 300}/bundle", "file/bundle"])
def test_a_place_that_cannot_be_written(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--model", "demo", "--output", str(tmp_path / output), "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"sd-export: cannot write {tmp_path / output} (")
    assert err.endswith("; choose another place with --output\n")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stages, "LIBRARIES", ("no_such_library",))
    assert main(["--model", "demo"]) == 1
    expected = 'sd-export: sd-export needs no_such_library; pip install "sd-lean[export]"\n'
    assert capsys.readouterr() == ("", expected)


def test_no_onnxruntime(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The export extra brings none, for it would hide one for GPUs; what is written is run once."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(stages, "LIBRARIES", ("no_such_library",))
    assert main(["--model", "demo"]) == 1
    assert capsys.readouterr().err == 'sd-export: sd-export needs no_such_library; pip install "sd-lean[export,cpu]"\n'
    monkeypatch.setattr(stages, "LIBRARIES", ())
    assert main(["--model", "demo"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sd-export: no engine library is installed: accepted onnxruntime or onnxruntime-gpu; ")
    assert 'pip install "sd-lean[cpu]"' in err


def test_output_of_an_export(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bundle"
    flags = ["--model", str(tiny_folder), "--output", str(target), "--components", "text_encoder"]
    assert main(flags) == 0
    out, err = capsys.readouterr()
    assert out == f"{target}\n"
    checkpoint, family, *others = err.splitlines()
    assert family == "tiny-model is Stable Diffusion of its own size"
    stages_shown = [line.split("  ")[0] for line in (checkpoint, *others)]
    assert stages_shown[:5] == ["checkpoint", *(f"text_encoder: {w}" for w in ("load", "trace", "write", "check"))]
    assert all(line.endswith((" s", "B")) for line in (checkpoint, *others))
    assert main([*flags, "--quiet"]) == 0
    assert capsys.readouterr() == (f"{target}\n", f"{target} is up to date\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_export.progress.REFRESH", 0.05)
    (tmp_path / "weights").write_bytes(bytes(1_500_000))
    stream = Terminal()
    with Progress(2, stream=stream) as progress, progress.stage("unet: trace", tmp_path / "weights"):
        time.sleep(0.3)
    shown = stream.getvalue()
    assert shown.count("unet: trace") > 3
    assert "1.5 MB" in shown


def test_quiet_progress_still_passes_notes() -> None:
    stream = Terminal()
    with Progress(2, quiet=True, stream=stream) as progress, progress.stage("unet: trace"):
        progress.note("waiting")
    assert stream.getvalue() == "waiting\n"


def test_a_failing_stage_is_not_reported_as_done() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress(1, stream=stream) as progress, progress.stage("unet: trace"):
        _ = 1 / 0
    assert stream.getvalue() == ""


def test_sizes() -> None:
    assert [describe_size(n) for n in (0, 999, 14_883_840, 3_438_000_000)] == ["0 B", "999 B", "14.9 MB", "3.4 GB"]


def test_warnings_of_the_package_are_notes() -> None:
    """They do not run into the bar, and are told when quiet, too."""
    stream, logger = io.StringIO(), logging.getLogger("sd_export.source.hub")
    with Progress(1, quiet=True, stream=stream):
        logger.warning("%s was removed from the hub", "a/b")
        logger.info("not worth a line")
    logger.warning("nobody listens")
    assert stream.getvalue() == "a/b was removed from the hub\n"


def test_quiet_keeps_what_the_libraries_say_to_themselves(tiny_folder: Path, tmp_path: Path) -> None:
    """diffusers warns of a field in a config that it does not know."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    config = folder / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"a_field_of_later": 1}))
    code = "import sys; from sd_export.cli import main; sys.exit(main())"
    flags = ["--components", "vae_decoder", "--no-verify", "--force", "--output", str(tmp_path / "out")]
    said = []
    for more in ([], ["--quiet"]):
        command = [sys.executable, "-c", code, "--model", str(folder), *flags, *more]
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        said.append(done.stderr)
        shutil.rmtree(tmp_path / "out")
    assert "a_field_of_later" in said[0] and said[1] == ""


def test_what_a_library_raises_names_the_network(
    tiny_folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """onnx_ir's SerdeError, say, in the middle of an export."""

    class SerdeError(RuntimeError):
        pass

    def fail(*_: object) -> None:
        raise SerdeError("Error calling serialize_model_into with: ModelProto")

    monkeypatch.setattr("sd_export.networks.export.save", fail)
    flags = ["--components", "vae_decoder", "--no-verify", "--output", str(tmp_path / "out"), "--quiet"]
    assert main(["--model", str(tiny_folder), *flags]) == 1
    assert "vae_decoder of '" in (said := capsys.readouterr().err) and "(SerdeError: Error calling" in said
    assert not (tmp_path / "out").exists() and said.count("\n") == 1


def test_everybody_may_read_what_was_exported(demo_bundle: Path) -> None:
    """As the umask says; safetensors' own writer would leave files for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    modes = {path: path.stat().st_mode & 0o777 for path in demo_bundle.rglob("*") if path.is_file()}
    assert modes and set(modes.values()) == {0o666 & ~mask}, modes
