#!/usr/bin/env python3
"""Ours against a plain diffusers script on the CPU: same weights, prompt, steps, seed, float32 and thread count.

    scripts/benchmark.py [BUNDLE] [--rounds 5] [--json FILE]

    cold    a new process, from its start to the picture on disk: sd-run against scripts/plain_diffusers.py
    memory  that process's peak resident memory
    warm    one picture, from prompt to pixels, in a process that has already drawn one

The two sides take turns, so that a slow minute of the machine hits both; medians are compared.  Exit code 1: a target
was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Nothing heavy up here: a child's peak memory starts from that of the process which forked it.

SCRIPTS = Path(__file__).resolve().parent
CHECKPOINT = SCRIPTS.parent / "export/sd_export/demo_checkpoint"
PROMPT, STEPS, GUIDANCE_SCALE, SEED = "a large yellow star on a blue background", 25, 4.0, 1
SIDES = ("ours", "diffusers")
LIBRARIES = ("onnxruntime", "numpy", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Comparison:
    """One quantity on both sides, a value a round; `target` is the least ratio of medians, diffusers over ours."""

    name: str
    unit: str
    ours: tuple[float, ...]
    diffusers: tuple[float, ...]
    target: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.diffusers) / statistics.median(self.ours)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.serve:
        serve(args.serve, args.bundle)
        return 0
    environment = os.environ | {"OMP_NUM_THREADS": str(physical_cores()), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        pictures = {side: Path(folder, f"{side}.png") for side in SIDES}
        comparisons = [
            *compare_cold(args.bundle, args.rounds, pictures, environment),
            compare_warm(args.bundle, args.rounds, environment),
        ]
        likeness = psnr(pictures["ours"], pictures["diffusers"])
    machine = describe_machine()
    show(machine, comparisons, likeness)
    if args.json:
        rows = [asdict(comparison) | {"ratio": comparison.ratio} for comparison in comparisons]
        args.json.write_text(
            json.dumps({"machine": machine, "psnr_db": likeness, "comparisons": rows}, indent=1) + "\n"
        )
    return 0 if all(comparison.ratio >= comparison.target for comparison in comparisons) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="out/demo-bundle", metavar="BUNDLE", help="of the demo checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each side (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured value")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # how this script calls itself for `warm`
    return parser.parse_args(arguments)


def compare_cold(
    bundle: str, rounds: int, pictures: dict[str, Path], environment: dict[str, str]
) -> tuple[Comparison, Comparison]:
    """Start to picture on disk in seconds, and peak memory in MB."""
    settings = [PROMPT, "--steps", STEPS, "--guidance-scale", GUIDANCE_SCALE, "--seed", SEED]
    sd_run = [Path(sys.executable).parent / "sd-run", *settings, "--model", bundle, "--device", "cpu", "--quiet"]
    plain = [sys.executable, SCRIPTS / "plain_diffusers.py", CHECKPOINT, PROMPT, STEPS, GUIDANCE_SCALE, SEED]
    commands = {
        "ours": [*sd_run, "--overwrite", "--output", pictures["ours"]],
        "diffusers": [*plain, pictures["diffusers"]],
    }
    runs = alternate(rounds, {side: partial(run, commands[side], environment) for side in SIDES})
    seconds, megabytes = ({side: tuple(pair[i] for pair in runs[side]) for side in SIDES} for i in (0, 1))
    return Comparison("cold", "s", **seconds, target=4.0), Comparison("memory", "MB", **megabytes, target=2.0)


def compare_warm(bundle: str, rounds: int, environment: dict[str, str]) -> Comparison:
    """Seconds of one generation in a process that is warm."""
    with ExitStack() as stack:
        draws = {side: stack.enter_context(server(side, bundle, environment)) for side in SIDES}
        return Comparison("warm", "s", **alternate(rounds, draws), target=1.3)


def alternate(rounds: int, measures: dict[str, Callable[[], T]]) -> dict[str, tuple[T, ...]]:
    """Call each measure in turn, `rounds` times; the first turn only warms up (page cache, compiled modules)."""
    results = [{side: measure() for side, measure in measures.items()} for _ in range(rounds + 1)]
    return {side: tuple(result[side] for result in results[1:]) for side in measures}


def run(command: Sequence[object], environment: dict[str, str]) -> tuple[float, float]:
    """(seconds, peak resident MB) of a process, from before its start to after its end."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{output.read().decode(errors='replace')}")
    return seconds, usage.ru_maxrss * 1024 / 1e6  # Linux counts in KiB


@contextmanager
def server(side: str, bundle: str, environment: dict[str, str]) -> Iterator[Callable[[], float]]:
    """A process that keeps its model loaded; the callable has it draw once and returns the seconds."""
    command = [sys.executable, __file__, "--serve", side, bundle]
    with subprocess.Popen(
        command, env=environment, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        to_child, from_child = process.stdin, process.stdout

        def draw() -> float:
            to_child.write("draw\n")
            return float(from_child.readline())

        yield draw
        to_child.close()


def serve(side: str, bundle: str) -> None:
    """Draw once for each line on stdin and print how many seconds that took."""
    draw = load_ours(bundle) if side == "ours" else load_diffusers()
    for _ in sys.stdin:
        started = time.perf_counter()
        draw()
        print(time.perf_counter() - started, flush=True)


def load_ours(bundle: str) -> Callable[[], object]:
    from sd_runtime import Pipeline

    pipe = Pipeline.load(bundle, device="cpu")
    return lambda: pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE, seed=SEED).images


def load_diffusers() -> Callable[[], object]:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    return lambda: pipe(PROMPT, **settings, generator=torch.Generator().manual_seed(SEED)).images


def physical_cores() -> int:
    """The cores this process may use: ONNX Runtime takes as many threads by itself, torch is told to."""
    try:
        blocks = Path("/proc/cpuinfo").read_text().strip().split("\n\n")
    except OSError:
        return os.cpu_count() or 1
    fields = [dict(line.split(":", 1) for line in block.splitlines() if ":" in line) for block in blocks]
    named = [{key.strip(): value.strip() for key, value in block.items()} for block in fields]
    cores = {(block.get("physical id"), block.get("core id", block.get("processor"))) for block in named}
    return min(len(cores), len(os.sched_getaffinity(0)))


def psnr(one: Path, other: Path) -> float:
    """Peak signal-to-noise ratio of two pictures in dB: that both sides drew the same."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(path), np.float64) for path in (one, other))
    return float(10 * np.log10(255**2 / max(float(((a - b) ** 2).mean()), 1e-10)))


def describe_machine() -> dict[str, str]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].split(":", 1)[1].strip() if model else platform.machine(),
        "threads": str(physical_cores()),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


def show(machine: dict[str, str], comparisons: list[Comparison], likeness: float) -> None:
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{PROMPT!r}, {STEPS} steps, guidance {GUIDANCE_SCALE}; both pictures agree to {likeness:.1f} dB")
    print(f"{'':8} {'ours':>12} {'diffusers':>12} {'ratio':>8} {'target':>8}   medians of {len(comparisons[0].ours)}")
    for c in comparisons:
        ours, theirs = (f"{statistics.median(values):.3f} {c.unit}" for values in (c.ours, c.diffusers))
        missed = "" if c.ratio >= c.target else "   missed"
        print(f"{c.name:8} {ours:>12} {theirs:>12} {c.ratio:8.2f} {c.target:8.2f}{missed}")


if __name__ == "__main__":
    sys.exit(main())
