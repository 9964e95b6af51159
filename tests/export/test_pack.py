"""Publishing a bundle: whatever happens, the target is the old folder, the new one, or not there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sd_export import pack
from sd_runtime.errors import ExportError

STEPS = ("write", "sync", "swap", "clean")


def publish(target: Path, content: str, *, fail: Exception | None = None) -> None:
    with pack.locked(target, pytest.fail), pack.staged(target) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "file").write_text(content)
        (folder / "manifest.json").write_text(content)
        if fail is not None:
            raise fail


def content(target: Path) -> set[str]:
    """What the files of a target say; complete bundles agree in one word."""
    return {path.read_text() for path in (target / "manifest.json", target / "unet" / "file")}


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_publishes_a_new_folder_and_replaces_an_old_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "demo"
    publish(target, "first")
    assert content(target) == {"first"}
    publish(target, "second")
    assert content(target) == {"second"}
    assert beside(target) == [".demo.lock"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


def test_replaces_where_folders_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_swap", lambda first, second: False)
    target = tmp_path / "demo"
    publish(target, "first")
    publish(target, "second")
    assert content(target) == {"second"}
    assert beside(target) == [".demo.lock"]


def test_a_failure_leaves_the_old_bundle(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    publish(target, "first")
    with pytest.raises(ZeroDivisionError):
        publish(target, "second", fail=ZeroDivisionError())
    with pytest.raises(KeyboardInterrupt):
        publish(target, "second", fail=KeyboardInterrupt())  # type: ignore[arg-type]
    assert content(target) == {"first"}
    assert beside(target) == [".demo.lock"]


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from sd_export import pack

target, where, can_swap = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

with pack.locked(target, print), pack.staged(target) as folder:
    (folder / "manifest.json").write_text("second")
    if where == "write":
        die()
    (folder / "unet").mkdir()
    (folder / "unet" / "file").write_text("second")
    if not can_swap:
        pack._swap = lambda first, second: False
    if where == "sync":
        pack._publish = die
    if where == "swap":  # between the two renames, or right after the exchange
        rename = Path.rename
        Path.rename = lambda path, to: die() if path == folder else rename(path, to)
        pack._fsync_folder = lambda path: die() if path == target.parent else None
    if where == "clean":
        shutil.rmtree = die
"""


@pytest.mark.parametrize("can_swap", [True, False])
@pytest.mark.parametrize("where", STEPS)
def test_fault_15_killed_in_the_middle(tmp_path: Path, where: str, can_swap: bool) -> None:
    target = tmp_path / "demo"
    publish(target, "first")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target), where, str(can_swap)], check=False)
    assert killed.returncode == -signal.SIGKILL
    if target.exists():
        assert content(target) in ({"first"}, {"second"})
    else:
        assert not can_swap  # set aside for a moment; the next export brings it back
    with pack.locked(target, pytest.fail):
        assert content(target) == {"second" if where == "clean" or (where == "swap" and can_swap) else "first"}
        assert beside(target) == [".demo.lock"]


FULL = """
import resource, sys
from pathlib import Path
from sd_export import pack
from sd_runtime.cli.console import run

def export():
    target = Path(sys.argv[1])
    with pack.locked(target, print), pack.staged(target) as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        (folder / "weights").write_bytes(bytes(2000))

sys.exit(run("sd-export", export))
"""


def test_fault_16_disk_full(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    publish(target, "first")
    full = subprocess.run([sys.executable, "-c", FULL, str(target)], capture_output=True, text=True, check=False)
    assert full.returncode == 1
    assert full.stderr.startswith(f"sd-export: no space left to write {target}")
    assert "--output" in full.stderr
    assert full.stderr.count("\n") == 1
    assert content(target) == {"first"}
    assert beside(target) == [".demo.lock"]


HOLDER = """
import sys, time
from pathlib import Path
from sd_export import pack

with pack.locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(target: Path, seconds: float) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_fault_17_a_second_export_says_whom_it_waits_for(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    notices: list[str] = []
    with hold(target, 0.5) as holder, pack.locked(target, notices.append):
        assert holder.wait(5) == 0
    assert notices == [f"waiting for another export to {target} (process {holder.pid})"]


def test_fault_18_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    with hold(target, 60) as holder:
        holder.kill()
        holder.wait(5)
        start = time.monotonic()
        with pack.locked(target, lambda text: None):
            assert time.monotonic() - start < 5


def test_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot write .*--output"):
        publish(tmp_path / "file" / "demo", "first")


def test_other_errors_of_the_system_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "demo", "first", fail=FileNotFoundError(errno.ENOENT, "gone", "elsewhere"))


@pytest.mark.parametrize("name", ["n" * 300, f"{'n' * 300}/demo"])
def test_too_long_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match=r"cannot write .*\(File name too long.*--output"):
        publish(tmp_path / name, "first")


@pytest.mark.parametrize(("what", "reason"), [("partial", "File exists"), ("old", "File exists")])
def test_a_file_of_someone_else_is_left_where_an_export_works(tmp_path: Path, what: str, reason: str) -> None:
    other = tmp_path / f".demo.{what}"
    publish(tmp_path / "demo", "first")
    other.write_text("precious")
    with pytest.raises(ExportError, match=rf"cannot write .*demo \({reason}: .*\.demo\.{what}\); .*--output"):
        publish(tmp_path / "demo", "second")
    assert other.read_text() == "precious"
    assert content(tmp_path / "demo") == {"first"}


def test_a_folder_where_the_lock_goes(tmp_path: Path) -> None:
    (tmp_path / ".demo.lock").mkdir()
    with pytest.raises(ExportError, match=r"cannot write .*\(Is a directory: .*\.demo\.lock\); .*--output"):
        publish(tmp_path / "demo", "first")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system on which nothing can be made")
@pytest.mark.parametrize("name", ["x", "x/y/z"])
def test_a_place_where_nothing_can_be_made_is_not_waited_for(name: str) -> None:
    with pytest.raises(ExportError, match=rf"cannot write /proc/{name} \(.*--output"):
        publish(Path("/proc") / name, "first")


def test_a_folder_on_the_way_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = os.mkdir

    def refuse(path: Path, *args: int) -> None:
        if path == tmp_path / "a":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *args)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ExportError, match=r"cannot write .*demo \(Permission denied: .*/a\); .*--output"):
        publish(tmp_path / "a" / "b" / "demo", "first")


@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link", "folder", "link in a circle"])
def test_fault_52_lock_files_that_are_none(tmp_path: Path, kind: str) -> None:
    """Nothing is waited for, and what a link leads to stays as it is."""
    lock, secret = tmp_path / ".demo.lock", tmp_path / "secret"
    secret.write_text("kept")
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to({"link": "secret", "dangling link": "nothing", "link in a circle": ".demo.lock"}[kind])
    with pytest.raises(ExportError, match=rf"^cannot write {tmp_path}/demo \(.*{lock}\); choose another place"):
        publish(tmp_path / "demo", "first")
    assert secret.read_text() == "kept" and not (tmp_path / "nothing").exists() and not (tmp_path / "demo").exists()


STOPPED = """
import sys, time
from pathlib import Path
from sd_export import pack
from sd_runtime.cli.console import run

def export():
    with pack.locked(Path(sys.argv[1]), print), pack.staged(Path(sys.argv[1])) as folder:
        (folder / "manifest.json").write_text("half")
        print("building", flush=True)
        time.sleep(60)

sys.exit(run("sd-export", export))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_fault_47_stopped_while_exporting(tmp_path: Path, number: signal.Signals) -> None:
    target = tmp_path / "demo"
    publish(target, "first")
    command = [sys.executable, "-c", STOPPED, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        assert ".demo.partial" in beside(target)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert said == f"sd-export: {how}\n"
    assert beside(target) == [".demo.lock"] and content_of(target) == "first"


def test_fault_47_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    with subprocess.Popen([sys.executable, "-c", STOPPED, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    assert beside(target) == [".demo.lock", ".demo.partial"]
    publish(target, "second")
    assert beside(target) == [".demo.lock"]


def content_of(target: Path) -> str:
    return (target / "manifest.json").read_text()
