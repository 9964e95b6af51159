"""Output names and atomic writing: nothing is half-written, nothing is replaced unasked."""

from __future__ import annotations

import errno
import os
import signal
import string
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_runtime.errors import SDError, UsageError
from sd_runtime.images import files
from sd_runtime.images.files import FileTakenError, check_destination, expand_pattern, free_names, slug, write_file

# ---- names -----------------------------------------------------------------------------------------------------------


def expand(pattern, seeds=(7,), prompts=None):
    prompts = ["A large RED star, on blue!"] * len(seeds) if prompts is None else prompts
    return [str(path) for path in expand_pattern(pattern, seeds=seeds, prompts=prompts)]


def test_fields_are_filled_in():
    assert expand("cat.png") == ["cat.png"]
    assert expand("out/{seed}-{index:03}.PNG", seeds=(7, -8)) == ["out/7-000.PNG", "out/-8-001.PNG"]
    assert expand("{prompt}.png") == ["a-large-red-star-on-blue.png"]
    assert expand("{{{seed}}}.png") == ["{7}.png"]


@pytest.mark.parametrize(
    "pattern",
    [
        "{sampler}.png", "{}.png", "{0}.png", "{seed.__class__}.png", "{seed[0]}.png", "{seed!r}.png", "{.png", "}.png",
        "{index:>3}.png", "{index:999999999}.png", "{index:{seed}}.png", "{prompt:3}.png", "{prompt!s}.png",
    ],
)  # fmt: skip
def test_other_fields_and_formats_are_refused(pattern):
    with pytest.raises(UsageError, match=r"output pattern: got .*accepted \{seed\}, \{index\}, \{prompt\}"):
        expand(pattern)


@pytest.mark.parametrize("pattern", ["cat", "cat.jpg", "folder/", "", ".png", "{prompt}"])
def test_other_endings_are_refused(pattern):
    with pytest.raises(UsageError, match=r"names that end in \.png"):
        expand(pattern)


def test_several_pictures_need_several_names():
    with pytest.raises(UsageError, match=r"output for 2 pictures: got cat.png.*cat-\{index\}.png"):
        expand("cat.png", seeds=(1, 2))
    with pytest.raises(UsageError, match="a name for each"):
        expand("{prompt}.png", seeds=(1, 2), prompts=["a cat", "A CAT"])
    assert len(expand("{seed}.png", seeds=(1, 2))) == 2


@settings(deadline=None)
@given(st.text())
def test_a_slug_is_always_a_safe_name(prompt):
    name = slug(prompt)
    assert 0 < len(name.encode()) <= 60
    assert all(character.isalnum() or character == "-" for character in name)
    assert not name.startswith("-")


def test_slug_of_a_long_word_ends_at_a_character():
    assert slug("ö" * 100) == "ö" * 30
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("\ud800 . /") == "untitled"


def test_free_names_start_after_the_highest(tmp_path):
    for name in ("picture-0002.png", "picture-0010.PNG", "picture-x.png", "other-0099.png", "picture-0011.png.bak"):
        (tmp_path / name).touch()
    assert [path.name for path in islice(free_names(tmp_path), 2)] == ["picture-0011.png", "picture-0012.png"]
    with pytest.raises(UsageError, match="create the folder"):
        next(free_names(tmp_path / "missing"))


# ---- writing ---------------------------------------------------------------------------------------------------------


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_what_the_umask_leaves_or_those_of_the_replaced(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = write_file(tmp_path / "a.png", b"data")
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        path.chmod(0o640)
        write_file(path, b"more", overwrite=True)
        assert path.stat().st_mode & 0o777 == 0o640
        assert write_file(tmp_path / "b.png", b"data", overwrite=True).stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)


def test_a_file_is_written_and_nothing_else_is_left(tmp_path):
    path = write_file(tmp_path / "a.png", b"data")
    assert path.read_bytes() == b"data"
    assert names_in(tmp_path) == ["a.png"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_existing_file_is_replaced_only_when_told(tmp_path):
    path = write_file(tmp_path / "a.png", b"old")
    for check in (lambda: write_file(path, b"new"), lambda: check_destination(path)):
        with pytest.raises(FileTakenError, match=r"a\.png' exists; choose another name, or .*`overwrite`"):
            check()
    assert path.read_bytes() == b"old"
    check_destination(path, overwrite=True)
    assert write_file(path, b"new", overwrite=True).read_bytes() == b"new"
    assert names_in(tmp_path) == ["a.png"]


def test_a_folder_that_takes_no_files_is_found_out_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SDError, match=r"a\.png': Permission denied; choose a folder that you may write to"):
        check_destination(tmp_path / "a.png")


def test_a_dangling_link_counts_as_taken(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileTakenError):
        check_destination(tmp_path / "a.png")
    with pytest.raises(FileTakenError):
        write_file(tmp_path / "a.png", b"data")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_systems_without_hard_links_work_too(tmp_path, monkeypatch, number):
    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    path = write_file(tmp_path / "a.png", b"old")
    with pytest.raises(FileTakenError):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.png"]


@pytest.mark.parametrize("name", ["missing/a.png", "file/a.png", "a" * 300 + ".png", "folder"])
def test_impossible_names_are_usage_errors_that_say_what_to_do(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    for attempt in (write_file, lambda path, data, overwrite: check_destination(path, overwrite=overwrite)):
        with pytest.raises(UsageError, match=r"cannot write '.*; c(reate|hoose)"):
            attempt(path, b"data", overwrite=True)
    assert names_in(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("name", ["", ".", "a\0b.png"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UsageError, match="a file name"):
        write_file(Path(name), b"data")
    with pytest.raises(UsageError):
        check_destination(Path(name))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "may write to"), (errno.EROFS, "may write to"), (errno.ENOSPC, "free space"), (errno.EIO, "")],
)
def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, number, remedy):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SDError, match="cannot write") as caught:
        write_file(tmp_path / "a.png", b"data")
    assert not isinstance(caught.value, UsageError)
    assert os.strerror(number) in str(caught.value)
    assert remedy in str(caught.value)
    assert names_in(tmp_path) == [], "nothing is left behind"


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE")
def test_fault_16_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    path = write_file(tmp_path / "a.png", b"old")
    code = (
        "import resource, sys; from pathlib import Path; from sd_runtime.errors import SDError;"
        "from sd_runtime.images.files import write_file; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_file(Path(sys.argv[1]), bytes(100_000), overwrite=True)\n"
        "except SDError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_fault_38_killed_while_saving(tmp_path):
    """At every moment the name is the complete old file or the complete new one."""
    path = tmp_path / "a.png"
    sizes = [len(letter) * 200_000 for letter in string.ascii_lowercase[:2]]
    code = (
        "import sys; from pathlib import Path; from sd_runtime.images.files import write_file\n"
        "print('go', flush=True)\n"
        "while True:\n"
        "    for letter in (b'a', b'b'): write_file(Path(sys.argv[1]), letter * 200_000, overwrite=True)"
    )
    for attempt in range(8):
        with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.004 * attempt)
            process.send_signal(signal.SIGKILL)
        if path.exists():
            data = path.read_bytes()
            assert len(data) in sizes
            assert data in (b"a" * len(data), b"b" * len(data))


def test_several_processes_write_one_name_and_one_of_them_gets_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sd_runtime.images.files import FileTakenError, write_file\n"
        "try: write_file(Path(sys.argv[1]), sys.argv[2].encode() * 100_000)\n"
        "except FileTakenError: print('taken')"
    )
    path = tmp_path / "a.png"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, path, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    answers = [writer.communicate()[0].strip() for writer in writers]
    winner = answers.index("")
    assert answers.count("taken") == 3
    assert path.read_bytes() == str(winner).encode() * 100_000
    assert names_in(tmp_path) == ["a.png"]


SAVING = """
import os, sys, time
from pathlib import Path
from sd_runtime.cli.console import run
from sd_runtime.images import files

def fsync(descriptor):
    print("saving", flush=True)
    time.sleep(60)

os.fsync = fsync
sys.exit(run("sd-run", lambda: files.write_file(Path(sys.argv[1]), b"new", overwrite=True)))
"""


def saving(path):
    """A process in the middle of saving `path`."""
    command = [sys.executable, "-c", SAVING, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="SIGHUP")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_fault_47_stopped_while_saving(tmp_path, number):
    path = write_file(tmp_path / "a.png", b"old")
    with saving(path) as process:
        assert len(names_in(tmp_path)) == 2
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said == f"sd-run: {'interrupted' if number == signal.SIGINT else f'stopped by {number.name}'}\n"
    assert names_in(tmp_path) == ["a.png"] and path.read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_fault_47_what_a_killed_process_left_goes_with_the_next_that_saves_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    with saving(path) as process:
        alive = names_in(tmp_path)
        files._remove_stale.cache_clear()
        write_file(tmp_path / "b.png", b"b")
        assert names_in(tmp_path) == [*alive, "b.png"], "it is still being written"
        process.kill()
    other = tmp_path / ".sd-lean-00000000-1-0123456789abcdef.tmp"  # another machine's, in a shared folder
    for kept in (other, tmp_path / ".0123456789abcdef.tmp", tmp_path / ".sd-lean.tmp"):
        kept.touch()
    files._remove_stale.cache_clear()
    write_file(tmp_path / "c.png", b"c")
    assert names_in(tmp_path) == sorted([".0123456789abcdef.tmp", ".sd-lean.tmp", other.name, "b.png", "c.png"])


@pytest.mark.skipif(sys.platform == "win32", reason="SIGHUP")
def test_fault_47_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """nohup sd-run …"""
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SAVING.replace("sleep(60)", "sleep(1)")
    command = [sys.executable, "-c", ignoring, str(tmp_path / "a.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "saving\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 0
    assert names_in(tmp_path) == ["a.png"]
