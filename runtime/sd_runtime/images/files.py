"""Files that come out: their names, and writing that leaves all or nothing and never takes another file's place.

Standard library only, so that a command line can refuse a bad `--output` before anything heavy is imported.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import string
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

from ..errors import SDError, UsageError, one_line

FIELDS: Final = ("seed", "index", "prompt")
_INTEGER_FORMAT: Final = re.compile(r"0?[1-9]?[0-9]?d?")  # {index:03}: a width of at most two digits
_REMEDIES: Final = {
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "create the folder first",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "choose the name of a file",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space on that disk",
}
_USAGE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR)  # the rest is the system's fault
_NO_HARD_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


_TEMPORARY: Final = re.compile(r"\.sd-lean-([0-9a-f]{8})-([0-9]{1,9})-[0-9a-f]{16}\.tmp")  # machine, process, chance
_FOLDERS: Final = 64  # that are remembered as looked through


class FileTakenError(UsageError):
    """A file of that name exists and may not be replaced."""


# ---- names -----------------------------------------------------------------------------------------------------------


def expand_pattern(pattern: str, *, seeds: Sequence[int], prompts: Sequence[str]) -> list[Path]:
    """One path a picture from a pattern such as "picture-{seed}-{index:03}.png".

    {seed}, {index} (of the picture, from 0) and {prompt} (its words, as `slug`) are filled in from picture i's
    `seeds[i]` and `prompts[i]`; {{ and }} are braces.  UsageError: another field, a name that does not end in .png, or
    one name for several pictures."""
    pieces = _parse(pattern)
    paths = []
    for index, (seed, prompt) in enumerate(zip(seeds, prompts, strict=True)):
        values = {"seed": seed, "index": index, "prompt": slug(prompt)}
        name = "".join(text + (format(values[field], spec) if field else "") for text, field, spec in pieces)
        paths.append(Path(name))
    for path in paths:
        if path.suffix.lower() != ".png":
            raise UsageError("output", got=str(path), accepted="names that end in .png")
    if len({str(path).casefold() for path in paths}) < len(paths):
        stem, dot, suffix = pattern.rpartition(".")
        remedy = f"for example {stem}-{{index}}{dot}{suffix}"
        raise UsageError(f"output for {len(paths)} pictures", got=pattern, accepted="a name for each", remedy=remedy)
    return paths


def _parse(pattern: str) -> list[tuple[str, str, str]]:
    """A pattern as (literal text, field or "", format) triples, every field and format checked."""
    accepted = ", ".join(f"{{{field}}}" for field in FIELDS)
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise UsageError("output pattern", got=pattern, accepted=accepted, remedy="write {{ for a brace") from error
    pieces = []
    for text, field, spec, conversion in parts:
        if field is not None:
            known = field in FIELDS and not conversion
            if not known or (spec and (field == "prompt" or not _INTEGER_FORMAT.fullmatch(spec))):
                raise UsageError("output pattern", got=pattern, accepted=f"{accepted}, {{index:03}}")
        pieces.append((text, field or "", spec or ""))
    return pieces


def slug(prompt: str, limit: int = 60) -> str:
    """A prompt as part of a file name: letters and digits in lower case, dashes for all else, at most `limit` bytes."""
    words = "-".join(re.findall(r"[^\W_]+", prompt.lower()))
    return words.encode("utf-8", "ignore")[:limit].decode("utf-8", "ignore").rstrip("-") or "untitled"


def free_names(folder: Path, stem: str = "picture") -> Iterator[Path]:
    """picture-0001.png, picture-0002.png, ... in `folder`, starting after the highest number that is in use there."""
    taken = re.compile(rf"{re.escape(stem)}-(\d{{1,9}})\.png", re.IGNORECASE)
    with _errors_about(folder / stem):
        matches = [taken.fullmatch(path.name) for path in folder.iterdir()]
    number = max((int(match[1]) for match in matches if match), default=0)
    while True:
        number += 1
        yield folder / f"{stem}-{number:04}.png"


# ---- reading ---------------------------------------------------------------------------------------------------------


def why_unreadable(path: Path, *, streams: bool = False) -> str | None:
    """Why there is no regular file, or with `streams` pipe or device, to read at `path`, in words; None: there is."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENOENT and path.is_symlink():
            return f"it is a link to '{one_line(str(path.readlink()))}', which is not there"
        return {
            None: "no file can have this name",
            errno.ENOENT: "there is no such file",
            errno.ENOTDIR: "there is no such file",
            errno.ELOOP: "it is a link that leads to itself",
            errno.ENAMETOOLONG: "the name is too long",
            errno.EACCES: "you may not look into its folder",
        }.get(number) or str(error)
    if stat.S_ISREG(mode) or (streams and not stat.S_ISDIR(mode)):
        return None if os.access(path, os.R_OK) else "you may not read it"
    return "it is a folder" if stat.S_ISDIR(mode) else "it is a device or a pipe"


# ---- writing ---------------------------------------------------------------------------------------------------------


def check_destination(path: Path, *, overwrite: bool = False) -> None:
    """Raise, before the work, what `write_file` would: a name that is taken, a folder that is missing or read-only."""
    with _errors_about(path):
        path.parent.stat()
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(path.lstat().st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not overwrite:
                raise FileExistsError


def same_name(path: Path, other: Path) -> bool:
    """Whether both lead to one file, links resolved; as in `expand_pattern`, upper and lower case are one."""
    with _errors_about(path):
        return os.path.realpath(path).casefold() == os.path.realpath(other).casefold()


def write_file(path: Path, data: bytes, *, overwrite: bool = False) -> Path:
    """Write `data` so that `path` is at every moment the old file, none, or the complete new one.

    A new file gets the permissions that the umask leaves, one that replaces another those of the other.
    FileTakenError where the name is in use and `overwrite` is False, also when another process took it meanwhile;
    UsageError for an impossible name or a missing folder; SDError for what the system refuses."""
    with _errors_about(path):
        _remove_stale(path.parent)
        name = f".sd-lean-{_machine()}-{os.getpid()}-{os.urandom(8).hex()}.tmp"
        temporary = path.with_name(name)  # in the same folder, hence on the same disk
        try:
            _write_and_sync(temporary, data)
            if overwrite:
                with suppress(FileNotFoundError):
                    temporary.chmod(stat.S_IMODE(path.stat().st_mode))
                temporary.replace(path)
            else:
                _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


@lru_cache(_FOLDERS)
def _remove_stale(folder: Path) -> None:
    """Remove what a process that was killed while saving left in a folder; looked for once, before the first save."""
    if os.name != "posix":
        return  # nothing there tells whether a process is alive and does nothing else
    with suppress(OSError):
        for path in folder.iterdir():
            name = _TEMPORARY.fullmatch(path.name)
            if name is not None and name[1] == _machine() and not _is_alive(int(name[2])):
                path.unlink()


def _machine() -> str:
    """Eight digits for this machine's name: another's processes have numbers of their own."""
    return f"{zlib.crc32(os.uname().nodename.encode()) if os.name == 'posix' else 0:08x}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    """The system's errors as ours: what could not be written, why, and the remedy."""
    try:
        yield
    except FileExistsError as error:
        remedy = "choose another name, or allow it to be replaced with `overwrite`"
        raise FileTakenError(f"'{one_line(str(path))}' exists", remedy=remedy) from error
    except OSError as error:
        kind = UsageError if error.errno in _USAGE else SDError
        what = f"cannot write '{one_line(str(path))}': {error.strerror or type(error).__name__}"
        raise kind(what, remedy=_REMEDIES.get(error.errno or 0)) from error
    except ValueError as error:  # no name, or NUL in it
        raise UsageError("output", got=str(path), accepted="a file name") from error


def _write_and_sync(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, path: Path) -> None:
    """Give the finished file its name unless that is taken: linking fails then, where renaming would replace."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        path.open("xb").close()  # claim the name, then replace the empty file
        temporary.replace(path)
