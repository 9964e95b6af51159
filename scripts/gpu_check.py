#!/usr/bin/env python3
"""Check and time this project on a CUDA machine, with whatever of TensorRT, ONNX Runtime and torch is installed there.

    scripts/gpu_check.py [--work DIR] [--minutes 8] [--only SECTION …] [--fresh] [--json FILE] [--dry-run]

Right first: noise against the GPU's own, the demo model's components against the CPU, its picture against diffusers.
Then fast: Stable Diffusion 1.5's true sizes with random weights in float16, by each library and by its peers, diffusers
and torch.compile.  One table at the end, and every number as JSON.

Each section runs in a process of its own and is kept in --work once it is done: a run that reached its minutes goes on
where it stopped when started again, with the same code and libraries on the same GPU; anything else begins anew.  What
is not installed is skipped, and said so.  --dry-run rehearses all of it on a CPU, with the demo model in the place of
the large one.  Exit code 1: something is wrong, or slower on an H200 than it must be there.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_sections as sections
from gpu_timing import ROOT, CheckOptions, Row, digest

LIBRARIES = ("tensorrt", "onnxruntime-gpu", "onnxruntime", "torch", "diffusers", "polygraphy", "cuda-core", "numpy")
TORCH = ("torch", "diffusers", "transformers", "onnxscript")
MARGIN = 15.0  # seconds that are left unused at the end
NO_TIME = "no time left: start again to go on"
PROMISED = "H200"  # the GPU that the promises are about
Promise = tuple[str, float, str]  # what, its value, and "≥ 1.2" or "≤ 1"


@dataclass(frozen=True)
class Section:
    """`needs`: modules that must be installed; `after`: folders that earlier sections leave behind; `expected`:
    seconds, less are not worth starting it; `rehearsed`: worth doing on a CPU."""

    run: Callable[[CheckOptions], Iterator[Row]]
    needs: tuple[str, ...]
    after: tuple[str, ...] = ()
    expected: float = 10.0
    rehearsed: bool = True

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", "-")


TENSORRT = ("tensorrt", "polygraphy", "filelock", "cuda.core")
ONNXRUNTIME = ("onnxruntime", "cuda.core")
# What takes longest comes last, and what the promises are about before what they are not about.
SECTIONS = (
    Section(sections.noise, ()),
    Section(sections.demo_export, TORCH, expected=30),
    Section(sections.demo_onnxruntime, ONNXRUNTIME, ("demo-fp32",)),
    Section(sections.sd15_export, TORCH, expected=60),
    Section(sections.sd15_onnxruntime, ONNXRUNTIME, ("sd15",), expected=100),
    Section(sections.diffusers_eager, TORCH, expected=60),
    Section(sections.torch_compile, TORCH, expected=100, rehearsed=False),
    Section(sections.demo_tensorrt, TENSORRT, ("demo-fp32",), expected=60),
    Section(sections.sd15_tensorrt, TENSORRT, ("sd15",), expected=200),
    Section(sections.sd15_tensorrt_batch, TENSORRT, ("sd15-tensorrt",), expected=150),
    Section(sections.torch_compile_max, TORCH, expected=240, rehearsed=False),
)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    settings = CheckOptions(args.work.resolve(), args.dry_run)
    if args.section:
        (section,) = [section for section in SECTIONS if section.name == args.section]
        with args.json.open("a") as written:
            for row in section.run(settings):
                print(json.dumps(asdict(row)), file=written, flush=True)
        return 0
    machine = describe(dry=args.dry_run)
    kept = settings.root / f"results-{hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:10]}.json"
    if args.fresh:
        shutil.rmtree(settings.work, ignore_errors=True)
        kept.unlink(missing_ok=True)
    settings.work.mkdir(parents=True, exist_ok=True)
    done = load(kept).get("sections", {})
    deadline = time.monotonic() + args.minutes * 60 - MARGIN
    for section in SECTIONS:
        if args.only and section.name not in args.only:
            continue
        if section.name not in done or done[section.name]["why"]:
            done[section.name] = attempt(section, settings, deadline)
            for path in filter(None, (kept, args.json)):
                write(judged(machine, done, kept), path)
    results = judged(machine, done, kept)
    if args.json:  # also where there was nothing left to do
        write(results, args.json)
    show(machine, done, results["promised"])
    for what in results["wrong"]:
        print(f"wrong: {what}")
    return 1 if results["wrong"] else 0


def judged(machine: dict[str, str], done: dict[str, Any], kept: Path) -> dict[str, Any]:
    """All results, with what they say of the promises and what is wrong."""
    promised = list(bars(done | elsewhere(kept, machine)))
    return {"machine": machine, "sections": done, "promised": promised, "wrong": wrong(machine, done, promised)}


def write(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def elsewhere(kept: Path, machine: dict[str, str]) -> dict[str, Any]:
    """What this code did on this GPU under other libraries, those of another Python for example."""
    others: dict[str, Any] = {}
    for path in sorted(kept.parent.glob("results-*.json")):
        content = load(path) if path != kept else {}
        if content and all(content["machine"][name] == machine[name] for name in ("gpu", "code")):
            others |= {f"{name} of {path.stem}": section for name, section in content["sections"].items()}
    return others


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/gpu-check"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing that would end later (default: 8)")
    parser.add_argument(
        "--only", nargs="+", choices=[s.name for s in SECTIONS], metavar="SECTION", help="not all of it"
    )
    parser.add_argument("--fresh", action="store_true", help="do again what is done")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # how this script calls itself
    return parser.parse_args(arguments)


def attempt(section: Section, settings: CheckOptions, deadline: float) -> dict[str, Any]:
    """Run a section if it can be run: its rows, what keeps it from being done ("": nothing), seconds, and when."""
    missing = [name for name in section.needs if not installed(name, settings)]
    absent = [name for name in section.after if not (settings.work / name).is_dir()]
    left = deadline - time.monotonic()
    if missing or absent:
        why = f"{', '.join(missing)} not installed" if missing else f"needs {', '.join(absent)} of an earlier section"
    elif settings.dry and not section.rehearsed:
        why = "not rehearsed"
    elif left < (1 if settings.dry else section.expected):
        why = NO_TIME
    else:
        return in_process(section, settings, left)
    print(f"-- {section.name}: skipped, {why}", flush=True)
    return {"rows": [], "why": why, "seconds": 0.0, "at": now()}


def in_process(section: Section, settings: CheckOptions, left: float) -> dict[str, Any]:
    """What a section has measured until its time was up is kept, though it will be begun again."""
    print(f"-- {section.name}", flush=True)
    start, at = time.monotonic(), now()
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder, "rows.jsonl")
        rows_file.touch()
        with memory_watched(settings) as peak:
            command = own_command(section, settings, rows_file)
            process = subprocess.Popen(command, env=environment(settings), start_new_session=True)
            try:
                code = process.wait(timeout=left)
                why = f"failed with exit code {code}; see above" if code else ""
            except subprocess.TimeoutExpired:
                why = NO_TIME
            finally:
                stop(process)
        rows = [json.loads(line) for line in rows_file.read_text().splitlines() if line.endswith("}")]
    if peak:
        rows.append(asdict(Row(f"{section.name}: peak memory in use on the GPU", max(peak) / 1024, "GiB")))
    return {"rows": rows, "why": why, "seconds": time.monotonic() - start, "at": at}


def own_command(section: Section, settings: CheckOptions, rows_file: Path) -> list[str]:
    command = [sys.executable, __file__, "--section", section.name, "--work", str(settings.root)]
    return [*command, "--json", str(rows_file), *(["--dry-run"] if settings.dry else [])]


def stop(process: subprocess.Popen[bytes]) -> None:
    """A section and all that it has started, building engines for example; so does Ctrl-C."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def environment(settings: CheckOptions) -> dict[str, str]:
    """Everything of ours on the path, caches in the work folder, nothing from the network."""
    paths = [str(ROOT / name) for name in ("runtime", "export", "scripts")]
    found = [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(found), "SD_LEAN_HOME": str(settings.root / "home"), "HF_HUB_OFFLINE": "1"}
    return os.environ | own | {"TORCHINDUCTOR_CACHE_DIR": str(settings.root / "inductor")}


@contextmanager
def memory_watched(settings: CheckOptions) -> Iterator[list[float]]:
    """The GPU memory in use, in MiB, sampled twice a second meanwhile, by one process: starting one is not free."""
    samples: list[float] = []
    if settings.dry or not shutil.which("nvidia-smi"):
        yield samples
        return
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=500"]
    with tempfile.TemporaryFile("w+") as output:
        watcher = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        try:
            yield samples
        finally:
            watcher.kill()
            watcher.wait()
            output.seek(0)
            samples += [float(line) for line in output.read().split() if line.replace(".", "", 1).isdigit()]


def smi(field: str) -> str:
    """One field of the first GPU, as nvidia-smi has it; empty without."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe(*, dry: bool) -> dict[str, str]:
    """What the results depend on: the GPU, the libraries, and this project's own code."""
    gpu = {"gpu": smi("name") or "none", "driver": smi("driver_version") or "none"}
    versions = {name: found for name in LIBRARIES if (found := installed_version(name))}
    own = {"python": platform.python_version(), **versions, "code": digest("runtime", "export", "scripts")}
    return {**({"gpu": "rehearsal on a CPU"} if dry else gpu), **own}


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def installed(module: str, settings: CheckOptions) -> bool:
    """Whether it can be imported and, ONNX Runtime, can use a GPU where one is checked."""
    if settings.dry and module == "cuda.core":
        return True  # nothing will need it
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a submodule of a package that is not there
        return False
    if found and module == "onnxruntime" and not settings.dry:
        code = "import sys, onnxruntime as ort; sys.exit('CUDAExecutionProvider' not in ort.get_available_providers())"
        return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    return found


def load(path: Path) -> dict[str, Any]:
    """The results of earlier runs; nothing where there are none, or none that can be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content


def show(machine: dict[str, str], done: dict[str, Any], promised: Sequence[Promise]) -> None:
    days = sorted({section["at"] for section in done.values()})
    print("\n" + ", ".join([*days[:1], *(f"{name} {value}" for name, value in machine.items())]))
    for name, section in done.items():
        for row in (Row(**values) for values in section["rows"]):
            mark = {None: "", True: "ok", False: "WRONG"}[row.good]
            limit = "" if row.limit is None else f"{'≥' if row.at_least else '≤'} {row.limit:g}"
            if row.p95 is not None:
                mark = f"p95 {row.p95:.4g}, p99 {row.p99:.4g} of {row.runs}"
            print(f"{row.what:<72}{row.value:>12.4g} {row.unit:<8}{limit:>9} {mark}".rstrip())
        if section["why"]:
            print(f"{name:<72}{section['why']}")
    for what, value, limit in promised:
        print(f"{what:<72}{value:>12.3g} {'':<8}{limit:>9} ")


def bars(done: dict[str, Any]) -> Iterator[Promise]:
    """What the project promises of the faster of its libraries, where all that it takes was measured."""
    rows = {row["what"]: Row(**row) for section in done.values() for row in section["rows"]}
    drawn = {library: rows.get(f"sd15, {library}: 50 steps, batch 1") for library in ("tensorrt", "onnxruntime")}
    measured = {library: row for library, row in drawn.items() if row is not None}
    if not measured:
        return
    library = min(measured, key=lambda name: measured[name].value)
    ours, compiled = measured[library], [row for what, row in rows.items() if what.startswith("sd15, torch.compile")]
    theirs = min(
        (row for row in compiled if row.what.endswith(": 50 steps, batch 1")), key=lambda r: r.value, default=None
    )
    host = rows.get(f"sd15, {library}: host time of a step, batch 1")
    if theirs:
        yield f"50 steps, batch 1: torch.compile's time over {library}'s", theirs.value / ours.value, "≥ 1.2"
    if host:
        yield f"{library}: host time of a step, batch 1, in per cent of it", host.value, "≤ 1"
    if ours.p99:
        yield f"{library}: 50 steps, batch 1: p99 over p50", ours.p99 / ours.value, "≤ 1.05"


def wrong(machine: dict[str, str], done: dict[str, Any], promised: Sequence[Promise]) -> list[str]:
    """What is wrong."""
    rows = [Row(**values) for section in done.values() for values in section["rows"]]
    found = [row.what for row in rows if row.good is False]
    if PROMISED in machine["gpu"]:
        found += [what for what, value, limit in promised if (value >= float(limit[2:])) != limit.startswith("≥")]
    return found + [name for name, section in done.items() if section["why"].startswith("failed")]


if __name__ == "__main__":
    sys.exit(main())
