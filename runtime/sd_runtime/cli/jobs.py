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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.manifest import Defaults
from ..errors import SDError, UsageError, one_line
from ..images.convert import grid, open_picture
from ..images.files import FileTakenError, check_destination, expand_pattern, write_file
from ..images.metadata import Parameters, parameters_json, png_bytes, read_parameters, save_numbered_png
from ..images.preview import strip
from ..provenance import SAFETY_CHECKER
from ..request import Request
from .settings import Settings

PREVIEW = "preview of sd-run"  # what a preview's PNG says it is
COUNT = "Grid pictures"  # of a sheet that is not full

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..generation import Generation
    from ..pipeline import Pipeline
    from ..result import Result


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
                open_picture(settings.image).close()
        jobs.append(Job(where, request, settings.image, cells, settings.seed is not None))
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
    for index, path in enumerate(job.paths or ()):
        if not os.path.lexists(path):
            check_free(path, saving)
            left.append(index)
        elif _is_done(pipeline, job, index):
            if saving.sidecar and not sidecar(path).exists():
                write_sidecar(path, read_parameters(path), overwrite=False)
        elif saving.overwrite:
            left.append(index)
        else:
            remedy = "choose another --output, or replace it with --overwrite"
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


def _is_done(pipeline: Pipeline, job: Job, index: int) -> bool:
    """Whether file `index` of a job says that it is what the job asks for."""
    assert job.paths is not None
    try:
        found = read_parameters(job.paths[index])
        with open_picture(job.paths[index], formats=("PNG",)) as picture:
            picture.verify()  # every chunk's checksum, up to the last: what it says stands in front
    except (UsageError, OSError, SyntaxError):  # SyntaxError: Pillow's for PNG that is none
        return False
    wanted = pipeline.parameters(job.request, index, pipeline.inputs(job.request, image=job.image))
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
    told = {"Grid": f"{rows}x{columns}"} | ({COUNT: str(count)} if count < rows * columns else {})
    return replace(parameters, extra=parameters.extra | told)


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
    """Draw a job, or those of its files that `indices` names, batch by batch, and hand out each once it is saved."""
    for part, images in _parts(pipeline, job, indices):
        generation = pipeline.start(part, image=job.image)
        watch(generation, saving)
        result = generation.result()
        if job.grid is not None:
            pictures = [(grid(result.images, *job.grid), on_sheet(result.parameters[0], job.grid, len(result.images)))]
        else:
            pictures = list(zip(result.images, result.parameters, strict=True))
        paths = [None if job.paths is None else job.paths[index] for index in images]
        yield result, [save(*picture, path, saving) for picture, path in zip(pictures, paths, strict=True)]


def _parts(pipeline: Pipeline, job: Job, indices: Sequence[int] | None) -> Iterator[tuple[Request, Sequence[int]]]:
    """The request in batches, so that what is done is saved early; a sheet needs all its pictures at once."""
    request = job.request
    wanted = range(1 if job.grid else request.num_images) if indices is None else indices
    if not wanted:
        return
    if job.grid is not None:
        yield request, wanted
        return
    seeds = tuple(request.seeds[i] for i in wanted)
    for batch in pipeline.batches(replace(request, num_images_per_prompt=len(wanted), seeds=seeds)):
        part = replace(request, num_images_per_prompt=len(batch), seeds=seeds[batch.start : batch.stop])
        yield part, [wanted[i] for i in batch]


def watch(generation: Generation, saving: Saving) -> None:
    """Run the steps: under a progress bar on a terminal, with a strip of previews where one is wanted."""
    steps: Iterator[object] = generation
    if saving.preview is not None:
        steps = _previewed(generation, saving.preview)
    if not saving.quiet and sys.stderr.isatty():
        from tqdm import tqdm

        steps = tqdm(steps, total=len(generation), unit="step", leave=False)
    for _ in steps:
        pass


def _previewed(generation: Generation, path: Path) -> Iterator[object]:
    """The steps, each shown in `path` by a new column: a row a picture of the batch."""
    batch, rows = range(0), list[list["Image"]]()
    for step in generation:
        if step.images != batch:
            batch, rows = step.images, [[] for _ in step.images]
        for row, cell in zip(rows, step.previews, strict=True):
            row.append(cell)
        write_file(path, png_bytes(strip(rows, generation.evaluations), description=PREVIEW), overwrite=True)
        yield step


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
