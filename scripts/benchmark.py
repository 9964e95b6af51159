#!/usr/bin/env python3
"""A bundle beside diffusers: the same weights, picture, seed and number of threads on the same machine.

    scripts/benchmark.py [BUNDLE] [--rounds N] [--cold N] [--json FILE] [--baseline FILE]

    cold start   a new process, from its start to the picture on disk: sd-run, and scripts/diffusers_peer.py
    peak memory  the peak resident memory of that process
    picture      one picture, from prompt to pixels, in a process that has drawn before
    step         one step of that picture

Both sides take turns, so a slow minute of the machine hits both.  A ratio is diffusers' median by ours: above 1, ours
is the better.  The targets are this project's, for the demo model on a CPU; the exit code is 1 where one is missed,
unless the ratios are compared with a baseline instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_baseline import Baseline, changes, read_baseline
from benchmark_baseline import table as table_of_changes
from sd_runtime.bench import report
from sd_runtime.bench.charts import Bar, bar_chart, standalone
from sd_runtime.bench.cli import NAMES, add_picture, check_outputs, notes, picture
from sd_runtime.bench.distribution import Distribution
from sd_runtime.bench.machine import describe_machine, physical_cores, versions
from sd_runtime.bench.processes import cold_command, installed, run
from sd_runtime.cli.arguments import ArgumentParser
from sd_runtime.cli.console import run_parsed
from sd_runtime.cli.report_files import check_report, write_report
from sd_runtime.errors import BundleError, DependencyError, SDError, UsageError

if TYPE_CHECKING:
    from sd_runtime.bundle.bundle import Bundle
    from sd_runtime.bundle.manifest import Manifest
    from sd_runtime.request import Request

# Nothing heavy up here: a new process's peak memory starts from that of the process which forked it.

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_BUNDLE = REPOSITORY / "out/demo-bundle"  # of scripts/demo
DEMO_CHECKPOINT = REPOSITORY / "export/sd_export/demo_checkpoint"
PEER: list[str | Path] = [sys.executable, REPOSITORY / "scripts/diffusers_peer.py"]
LIBRARIES = ("torch", "diffusers", "transformers")
TARGETS = {"cold start": 10.0, "peak memory": 4.0, "picture": 2.0}
SETTLE = 0.3  # seconds after which waiting threads of torch no longer spin

Samples = dict[str, tuple[list[float], list[float]]]  # of a quantity, ours and diffusers'


@dataclass(frozen=True)
class Comparison:
    """One quantity, measured on both sides; `target` is the least ratio that is aimed at, None where there is none."""

    name: str
    unit: str
    ours: Sequence[float]
    diffusers: Sequence[float]
    target: float | None

    @property
    def medians(self) -> tuple[float, float]:
        """Ours and diffusers'."""
        return Distribution.of(self.ours).p50, Distribution.of(self.diffusers).p50

    @property
    def ratio(self) -> float:
        ours, diffusers = self.medians
        return diffusers / ours

    @property
    def missed(self) -> bool:
        return self.target is not None and self.ratio < self.target


def build_parser() -> ArgumentParser:
    parser = ArgumentParser("benchmark.py", __doc__ or "")
    add = parser.add_argument
    add("bundle", nargs="?", metavar="BUNDLE", help="a bundle's folder or a model's name (default: scripts/demo's)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="of both sides (default: cpu)")
    add("--checkpoint", metavar="MODEL", help="what diffusers loads (default: what the bundle was made from)")
    add("--rounds", type=int, default=7, metavar="N", help="measured pictures of each side (default: 7)")
    add("--cold", type=int, default=5, metavar="N", help="measured new processes of each side (default: 5)")
    add("--json", type=Path, metavar="FILE", help="write every measured value to a JSON file")
    add("--plot", type=Path, metavar="FILE", help="write the ratios to an SVG file")
    add("--baseline", type=Path, metavar="FILE", help="compare the ratios with those in this file")
    add("--write-baseline", type=Path, metavar="FILE", help="write the ratios to a file for --baseline")
    add("--quiet", action="store_true", help="print only errors")
    add_picture(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    names = {**NAMES, "checkpoint": "--checkpoint", "write_baseline": "--write-baseline", "bundle": "BUNDLE"}
    return run_parsed("benchmark.py", build_parser, _run, argv, names)


def _run(args: argparse.Namespace) -> None:
    before = _check(args)
    from sd_runtime.bundle.bundle import Bundle, find_bundle

    bundle = Bundle.open(find_bundle(args.bundle or str(DEMO_BUNDLE)))
    request = picture(args, bundle)
    settings = peer_settings(request, args.checkpoint, bundle.manifest, args.device)
    comparisons, psnr = compare(bundle, request, settings, args)
    ratios = {comparison.name: round(comparison.ratio, 2) for comparison in comparisons}
    now = Baseline(describe_machine(), versions(LIBRARIES), ratios)
    if not args.quiet:
        print(table(bundle, request, now, comparisons, psnr))
        if before is not None:
            print(f"\n{table_of_changes(changes(before, now), before, now)}")
    if args.json is not None:
        rows = [asdict(comparison) | {"ratio": comparison.ratio} for comparison in comparisons]
        values = asdict(now) | {"settings": settings, "psnr_db": psnr, "comparisons": rows}
        write_report(args.json, json.dumps(values, indent=1) + "\n")
    if args.plot is not None:
        bars = [Bar(c.name, c.ratio, f"{c.ratio:.2f}", limit=c.target) for c in comparisons]
        write_report(args.plot, standalone([bar_chart("Times better than diffusers", bars)]))
    if args.write_baseline is not None:
        write_report(args.write_baseline, json.dumps(asdict(now), indent=1) + "\n")
    missed = [f"{c.name} {c.ratio:.2f}, target {c.target:g}" for c in comparisons if c.missed]
    if missed and before is None:
        raise SDError(f"a target was missed: {'; '.join(missed)}")


def _check(args: argparse.Namespace) -> Baseline | None:
    """Raise, before minutes of measuring, what can be known before; the baseline to compare with."""
    check_outputs(args)
    if args.write_baseline is not None:
        check_report(args.write_baseline)
    for name in ("rounds", "cold"):
        if getattr(args, name) < 1:
            raise UsageError(name, got=getattr(args, name), accepted="1 or more")
    if args.bundle is None and not DEMO_BUNDLE.is_dir():
        raise BundleError("the demo model is not exported yet", remedy="run scripts/demo, or name a bundle")
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"diffusers' side needs {', '.join(missing)}", remedy='pip install "sd-lean[export]"')
    return None if args.baseline is None else read_baseline(args.baseline)


def peer_settings(request: Request, checkpoint: str | None, manifest: Manifest, device: str) -> dict[str, Any]:
    """`request` in diffusers' words, as JSON takes it.  UsageError: diffusers has no such sampler."""
    from sd_runtime.sampling import resolve

    model, revision = (checkpoint, None) if checkpoint is not None else find_checkpoint(manifest)
    choice = None if request.scheduler is None else resolve(request.scheduler)
    return {
        "model": model,
        "revision": revision,
        "device": device,
        "precision": manifest.precision,
        "threads": physical_cores(),
        "prompt": request.prompts[0],
        "negative_prompt": request.negative_prompts[0] or None,
        "seed": request.seeds[0],
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "height": request.height,
        "width": request.width,
        "scheduler": choice and {"class_name": choice.reference_class(), "overrides": dict(choice.overrides)},
    }


def find_checkpoint(manifest: Manifest) -> tuple[str, str | None]:
    """The model and revision that the bundle was made from.

    BundleError: it was a folder or a file, whose place a bundle does not keep."""
    source = manifest.source
    if source.revision is not None:
        return source.id, source.revision
    if source.id == "demo":
        return str(DEMO_CHECKPOINT), None
    raise BundleError("the bundle does not say where its checkpoint is", remedy="name it with `checkpoint`")


def compare(
    bundle: Bundle, request: Request, settings: dict[str, Any], args: argparse.Namespace
) -> tuple[list[Comparison], float | None]:
    """All quantities, and the PSNR of both sides' pictures in dB (None: they are equal)."""
    note = notes("benchmark.py", args)
    note(f"start new processes, 1 + {args.cold} on each side")
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "ours.png"), Path(folder, "diffusers.png")
        samples = measure_cold(
            cold_command(bundle.root, request, pictures[0], args.device), settings, pictures[1], args.cold
        )
        psnr = compare_pictures(*pictures)
    note(f"draw 1 + {args.rounds} pictures on each side")
    samples |= measure_warm(bundle, request, settings, args.rounds)
    targets = TARGETS if bundle.manifest.source.id == "demo" and args.device == "cpu" else {}
    units = {"peak memory": "MB"}
    return [Comparison(name, units.get(name, "s"), *both, targets.get(name)) for name, both in samples.items()], psnr


def measure_cold(command: list[object], settings: dict[str, Any], picture: Path, count: int) -> Samples:
    """New processes of both sides in turns; the first turn only brings the files into the page cache."""
    peer = [*PEER, json.dumps(settings), picture]
    turns = [(run(command), run(peer, environment(settings))) for _ in range(count + 1)][1:]
    ours, diffusers = zip(*turns, strict=True)
    return {
        "cold start": ([cost.seconds for cost in ours], [cost.seconds for cost in diffusers]),
        "peak memory": ([cost.megabytes for cost in ours], [cost.megabytes for cost in diffusers]),
    }


def measure_warm(bundle: Bundle, request: Request, settings: dict[str, Any], rounds: int) -> Samples:
    """Pictures of both sides in turns, and their steps but the first of each; the first turn only warms up."""
    from sd_runtime.bench.stage_times import open_timed, time_picture, varied

    samples: Samples = {"picture": ([], []), "step": ([], [])}
    pipeline, calls = open_timed(bundle, settings["device"])
    with pipeline, warm_peer(settings) as draw:
        for number in range(rounds + 1):
            asked = varied(request, number)
            time.sleep(SETTLE)
            ours = time_picture(pipeline, calls, asked)
            diffusers = draw(asked.prompts[0], asked.seeds[0])
            if number == 0:
                continue
            samples["picture"][0].append(ours["picture"][0] - ours["png"][0])
            samples["picture"][1].append(diffusers["picture"])
            steps = [a + b for a, b in zip(ours["unet"], ours["host"], strict=True)] if ours["host"] else ours["unet"]
            samples["step"][0].extend(steps[1:] or steps)
            samples["step"][1].extend(diffusers["steps"])
    return {name: both for name, both in samples.items() if both[1]}  # a picture of one step has no others


@contextmanager
def warm_peer(settings: dict[str, Any]) -> Iterator[Callable[[str, int], dict[str, Any]]]:
    """A process that keeps its model loaded; draw(prompt, seed) → seconds of the picture and of its steps."""
    with subprocess.Popen(
        [*PEER, json.dumps(settings)], env=environment(settings), text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        to_peer, from_peer = process.stdin, process.stdout

        def draw(prompt: str, seed: int) -> dict[str, Any]:
            to_peer.write(json.dumps({"prompt": prompt, "seed": seed}) + "\n")
            answer = from_peer.readline()
            if not answer:
                raise SDError("diffusers' process ended before it had drawn")
            times: dict[str, Any] = json.loads(answer)
            return times

        try:
            yield draw
        finally:
            to_peer.close()


def environment(settings: dict[str, Any]) -> dict[str, str]:
    """Of diffusers' process: as many threads as ours has, and the hub's files from the cache without asking the hub."""
    threads = str(settings["threads"])
    return installed() | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def compare_pictures(one: Path, other: Path) -> float | None:
    """PSNR of two pictures in dB; None: they are equal to the last bit."""
    import numpy as np
    from sd_export.verify.measures import measure
    from sd_runtime.images.convert import open_picture

    psnr = measure(np.asarray(open_picture(one)), np.asarray(open_picture(other)), span=255).psnr
    return psnr if math.isfinite(psnr) else None


def table(bundle: Bundle, request: Request, now: Baseline, found: Sequence[Comparison], psnr: float | None) -> str:
    """All comparisons for people."""
    libraries = ", ".join(f"{name} {version}" for name, version in now.libraries.items())
    alike = "the pictures are equal" if psnr is None else f"the pictures agree to {psnr:.1f} dB (PSNR)"
    lines = [f"{bundle.root} beside {libraries}", *report.about(now.machine, request), alike, ""]
    lines.append(f"{'median':14}{'ours':>12}{'diffusers':>12}{'ratio':>8}{'target':>8}{'samples':>9}")
    for c in found:
        ours, diffusers = (report.seconds(x) if c.unit == "s" else f"{x:.0f} {c.unit}" for x in c.medians)
        target = "" if c.target is None else f"{c.target:g}"
        missed = "  missed" if c.missed else ""
        lines.append(f"{c.name:14}{ours:>12}{diffusers:>12}{c.ratio:>8.2f}{target:>8}{len(c.ours):>9}{missed}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
