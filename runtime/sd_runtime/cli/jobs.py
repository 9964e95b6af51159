"""What a command line draws, as a list of jobs: where their pictures go, which of them are there, drawing the rest.

A job is one request.  A single prompt is one job, a prompts file one a line, and a prompts file can be resumed: the
pictures' names are settled beforehand, every picture is written as a whole as soon as it is drawn, and says how it was
made.  So what is there and says what it should say is done, and no journal is needed.
"""

from __future__ import annotations

import os
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import SDError, UsageError, one_line
from ..images.convert import check_scaling, grid, open_picture
from ..images.files import FileTakenError, check_destination, expand_pattern, write_file
from ..images.metadata import Parameters, parameters_json, png_bytes, read_parameters, save_numbered_png
from ..images.preview import strip
from ..inputs import Inputs
from ..provenance import SAFETY_CHECKER
from ..request import Defaults, Request
from ..result import Result, Step
from .settings import Settings

PREVIEW = "preview of sd-run"  # what a preview's PNG says it is
COUNT = "Grid pictures"  # of a sheet that is not full

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..generation import Generation
    from ..pipeline import Pipeline


@dataclass(frozen=True)
class Job:
    """One request, and where its pictures go.

    where    what to name in an error: "prompts.txt line 3", or ""
    image    path of the picture to change, if any
    grid     rows and columns of the one sheet that all its pictures go on; None: a file each
    seeded   whether the user chose the seed: a random one is another one next time
    paths    of its files; None: picture-0001.png and so on in the current folder, whatever is free
    """

    where: str
    request: Request
    image: str | None
    grid: tuple[int, int] | None
    seeded: bool
    paths: tuple[Path, ...] | None = None


@dataclass(frozen=True)
class Saving:
    """How pictures are saved.

    overwrite  replace files that are in the way
    sidecar    write what a picture says about itself to a .json beside it, too
    preview    file that shows all steps so far, after each step
    quiet      print nothing
    """

    overwrite: bool = False
    sidecar: bool = False
    preview: Path | None = None
    quiet: bool = False


# ---- what to draw, and where to --------------------------------------------------------------------------------------


def make_jobs(lines: Sequence[tuple[str, Settings]], defaults: Defaults, pattern: str | None) -> list[Job]:
    """A job for each (where, settings); `pattern` names all their pictures, see `output.expand_pattern`."""
    jobs = []
    for where, settings in lines:
        with error_at(where):
            request = settings.request(defaults)
            cells = None if settings.grid is None else settings.cells(settings.grid)
            if settings.image is not None:
                with open_picture(settings.image) as picture:
                    check_scaling(picture, (request.width, request.height), request.resize)
        jobs.append(Job(where, request, settings.image, cells, settings.options.get("seed") is not None))
    return jobs if pattern is None else _placed(jobs, pattern)


def _placed(jobs: Sequence[Job], pattern: str) -> list[Job]:
    """The jobs with their files' names: one for each picture, or one for a sheet."""
    counts = [1 if job.grid else job.request.num_images for job in jobs]
    paths = iter(
        expand_pattern(
            pattern,
            seeds=[seed for job, count in zip(jobs, counts, strict=True) for seed in job.request.seeds[:count]],
            prompts=[job.request.prompts[0] for job, count in zip(jobs, counts, strict=True) for _ in range(count)],
        )
    )
    return [replace(j, paths=tuple(next(paths) for _ in range(n))) for j, n in zip(jobs, counts, strict=True)]


def default_pattern(prompts_file: Path) -> str:
    """prompts-0000.png and so on in the current folder, for prompts.txt."""
    return prompts_file.stem.replace("{", "{{").replace("}", "}}") + "-{index:04}.png"


def check_resumable(jobs: Sequence[Job], pattern: str) -> None:
    """UsageError if the pictures' names would be others the next time."""
    named_by_seed = any(field == "seed" for _, field, _, _ in string.Formatter().parse(pattern))
    if named_by_seed and not all(job.seeded for job in jobs):
        raise UsageError(
            "output pattern", got=pattern, accepted="{seed} where every line has one", remedy="give --seed"
        )


@contextmanager
def error_at(where: str) -> Iterator[None]:
    """Let our errors say where in a prompts file they happened."""
    try:
        yield
    except SDError as error:
        if not where or error.what.startswith(where):
            raise
        raise type(error)(
            f"{where}: {error.what}", got=error.got, accepted=error.accepted, remedy=error.remedy
        ) from error


# ---- what is there already -------------------------------------------------------------------------------------------


def missing(pipeline: Pipeline, job: Job, saving: Saving) -> list[int]:
    """Which of a job's files are yet to be drawn.  UsageError: something else has a file's name."""
    left = []
    inputs: Inputs | None = None  # read once, and only where there is a file to compare with
    for index, path in enumerate(job.paths or ()):
        if not os.path.lexists(path):
            check_free(path, saving)
            left.append(index)
            continue
        inputs = inputs or pipeline.inputs(job.request, image=job.image)
        if _is_done(pipeline.parameters(job.request, index, inputs), job, path):
            if saving.sidecar and not sidecar(path).exists():
                write_sidecar(path, read_parameters(path), overwrite=False)
        elif saving.overwrite:
            left.append(index)
        else:
            remedy = "choose another `output`, or replace it with `overwrite`"
            raise FileTakenError(f"'{one_line(str(path))}' exists and is not the picture asked for", remedy=remedy)
    return left


def check_free(path: Path, saving: Saving) -> None:
    """Raise what saving a picture as `path` would raise, before the work."""
    check_destination(path, overwrite=saving.overwrite)
    if saving.sidecar:
        check_destination(sidecar(path), overwrite=saving.overwrite)


def sidecar(path: Path) -> Path:
    """The .json beside a picture."""
    return path.with_suffix(".json")


def _is_done(wanted: Parameters, job: Job, path: Path) -> bool:
    """Whether a file says that it is what the job asks for, which would say what is `wanted`."""
    try:
        found = read_parameters(path)
        with open_picture(path, formats=("PNG",)) as picture:
            picture.verify()  # every chunk's checksum, up to the last: what it says stands in front
    except (UsageError, OSError, SyntaxError):  # SyntaxError: Pillow's for PNG that is none
        return False
    wanted = on_sheet(wanted, job.grid, job.request.num_images)
    asked = {key: value for key, value in found.extra.items() if key != SAFETY_CHECKER}
    return replace(found, version=None, seed=found.seed if job.seeded else None, extra=asked) == replace(
        wanted, version=None, seed=wanted.seed if job.seeded else None
    )


def on_sheet(parameters: Parameters, cells: tuple[int, int] | None, count: int) -> Parameters:
    """What a sheet of `count` pictures says: what its first one does, its rows, columns and, if not full, `count`."""
    if cells is None:
        return parameters
    rows, columns = cells
    sheet = {"Grid": f"{rows}x{columns}"} | ({COUNT: str(count)} if count < rows * columns else {})
    return replace(parameters, extra=parameters.extra | sheet)


def off_sheet(parameters: Parameters) -> tuple[Parameters, int | None]:
    """What a sheet says but for how many pictures it holds, and that; None where it is full, or no sheet."""
    extra = dict(parameters.extra)
    if "Grid" not in extra or not re.fullmatch(r"[1-9]\d{0,3}", extra.get(COUNT, "")):
        return parameters, None
    count = int(extra.pop(COUNT))
    return replace(parameters, extra=extra), count


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(
    pipeline: Pipeline, job: Job, indices: Sequence[int] | None, saving: Saving
) -> Iterator[tuple[Result, list[Path]]]:
    """Draw a job, or those of its files that `indices` names, and hand out each batch once it is saved.

    The prompt and the picture to change are encoded once; a sheet waits for all its pictures."""
    wanted = range(1 if job.grid else job.request.num_images) if indices is None else indices
    if not wanted:
        return
    if job.grid is not None:
        generation = _begun(pipeline, job.request, job.image)
        for _ in watched(generation, generation, saving):
            pass
        result = generation.result()
        sheet = grid(result.images, *job.grid), on_sheet(result.parameters[0], job.grid, len(result.images))
        yield result, [save(*sheet, job.paths[wanted[0]] if job.paths else None, saving)]
        return
    seeds = tuple(job.request.seeds[i] for i in wanted)
    request = replace(job.request, num_images_per_prompt=len(wanted), seeds=seeds)
    generation = _begun(pipeline, request, job.image)
    for item in watched(generation, generation.results(), saving):
        if not isinstance(item, Step):
            paths = [job.paths[wanted[i]] if job.paths else None for i in item.indices]
            drawn = zip(item.images, item.parameters, paths, strict=True)
            yield item, [save(picture, parameters, path, saving) for picture, parameters, path in drawn]


def _begun(pipeline: Pipeline, request: Request, image: str | None) -> Generation:
    """As `pipeline.start`, whose notices were said when all jobs were looked at."""
    return pipeline.generate(pipeline.prepare(request, pipeline.inputs(request, image=image)))


def notices(pipeline: Pipeline, jobs: Iterable[Job]) -> list[str]:
    """What the jobs ask for that has no effect, with the line that asks for it first."""
    said = dict[str, str]()
    for job in jobs:
        for notice in pipeline.notices(job.request):
            said.setdefault(notice, job.where)
    return [f"{where}: {notice}" if where else notice for notice, where in said.items()]


Item = TypeVar("Item", bound="Step | Result")


def watched(generation: Generation, items: Iterable[Item], saving: Saving) -> Iterator[Item]:
    """The same items, while their steps move a progress bar on a terminal and fill a strip of previews, if one is
    wanted: a column a step, a row a picture of the batch."""
    batch, rows = range(0), list[list["Image"]]()
    with _progress(len(generation), saving) as advance:
        for item in items:
            if isinstance(item, Step):
                advance()
                if saving.preview is not None:
                    if item.images != batch:
                        batch, rows = item.images, [[] for _ in item.images]
                    for row, cell in zip(rows, item.previews, strict=True):
                        row.append(cell)
                    picture = png_bytes(strip(rows, generation.evaluations), description=PREVIEW)
                    write_file(saving.preview, picture, overwrite=True)
            yield item


@contextmanager
def _progress(steps: int, saving: Saving) -> Iterator[Callable[[], object]]:
    """What to call after each step."""
    if saving.quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=steps, unit="step", leave=False) as bar:
        yield bar.update


def is_preview(path: Path) -> bool:
    """Whether the file is a preview of an earlier run."""
    try:
        with open_picture(path, formats=("PNG",)) as picture:
            return bool(picture.info.get("Description") == PREVIEW)
    except UsageError:
        return False


def save(picture: Image, parameters: Parameters, path: Path | None, saving: Saving) -> Path:
    """Write a picture and what goes with it."""
    if path is None:
        path = save_numbered_png(picture, ".", parameters=parameters)
    else:
        write_file(path, png_bytes(picture, parameters), overwrite=saving.overwrite)
    if saving.sidecar:
        write_sidecar(path, parameters, overwrite=saving.overwrite)
    return path


def write_sidecar(path: Path, parameters: Parameters, *, overwrite: bool) -> None:
    write_file(sidecar(path), (parameters_json(parameters, indent=2) + "\n").encode(), overwrite=overwrite)
