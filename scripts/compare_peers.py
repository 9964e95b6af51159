#!/usr/bin/env python3
"""The same picture by ours, diffusers, optimum and OpenVINO on the CPU, each in an environment of its own.

    scripts/compare_peers.py BUNDLE CHECKPOINT [--steps 25] [--width W --height H] [--rounds 3] [--json FILE]

    picture   how closely it agrees with diffusers' (PSNR)
    step      seconds of a step: the fastest long run less the fastest short one, by the steps between them, warm
    cold      a new process, from its start to its first picture on disk
    memory    the most that this process had resident until its end
    install   what its packages take on disk, beyond a bare virtual environment

Peers run one at a time, in turns, and the first round only warms the page cache up.  Of times the least is taken, for
whatever else a machine does only adds to them; of memory the median.  All draw in float32 from the same weights with as
many threads as there are cores, but for the two of bfloat16, which is what OpenVINO does on processors that have it
unless it is told otherwise.  `openvino` is the library called directly, `ours-openvino` our backend of that name.

Environments are made in --environments (default: .venv-peers) when they are missing, several gigabytes together;
--python PEER=EXECUTABLE takes one that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from install_size import SIZES
from sd_runtime.bench.machine import describe_machine, physical_cores
from sd_runtime.bench.processes import installed

REPOSITORY = Path(__file__).resolve().parents[1]
WORKER = REPOSITORY / "scripts/peer_worker.py"
CONSTRAINTS = ["-c", "scripts/constraints.txt"]
# What each environment is made of; optimum's exporter for ONNX does not take transformers 5.
ENVIRONMENTS: dict[str, list[str]] = {
    "ours": [*CONSTRAINTS, ".[cpu]"],
    "diffusers": [*CONSTRAINTS, "torch", "diffusers", "transformers"],
    "optimum": ["torch", "optimum-onnx[onnxruntime]==0.1.0", "transformers<4.58", "diffusers"],
    "openvino": [*CONSTRAINTS, ".[openvino]"],
}
PEERS = {  # and the environment of each
    "ours": "ours",
    "ours-openvino": "openvino",
    "ours-openvino-bf16": "openvino",
    "diffusers": "diffusers",
    "optimum": "optimum",
    "openvino": "openvino",
    "openvino-bf16": "openvino",
}
REFERENCE = "diffusers"
BARE = ("pip", "setuptools")


@dataclass(frozen=True)
class Run:
    """One process: seconds to its first picture, of its fastest short and long runs, and peak resident megabytes."""

    cold: float
    short: float
    long: float
    memory: float


@dataclass(frozen=True)
class Row:
    """The least of a peer's times and its median memory; `psnr` in dB against diffusers' picture, None where it is the
    same to the last bit."""

    peer: str
    psnr: float | None
    step: float
    cold: float
    memory: float
    install: float


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    pythons = dict(definition.partition("=")[::2] for definition in args.python)
    for environment in dict.fromkeys(PEERS[peer] for peer in args.peers):
        if environment not in pythons:
            pythons[environment] = str(make_environment(args.environments / environment, ENVIRONMENTS[environment]))
    folder = args.pictures
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {peer: [] for peer in args.peers}
    for number in range(args.rounds + 1):
        for peer in args.peers:
            run = measure(pythons[PEERS[peer]], peer, settings(args, folder / f"{peer}.png"))
            print(f"round {number}: {peer} {run}", file=sys.stderr, flush=True)
            runs[peer] += [run] if number else []
    steps = args.steps - args.short
    rows = [row(peer, runs[peer], steps, folder, pythons[PEERS[peer]]) for peer in args.peers]
    print(table(args, rows))
    if args.json:
        values = {"machine": describe_machine(), "settings": settings(args, folder), "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(values, indent=1, default=str) + "\n")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a float32 bundle")
    add("checkpoint", metavar="CHECKPOINT", help="what it was exported from: a folder in diffusers layout")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    add("--steps", type=int, default=25, help="of the picture (default: %(default)s)")
    add("--short", type=int, default=5, help="steps of the run that is taken off (default: %(default)s)")
    add("--width", type=int, default=128)
    add("--height", type=int, default=128)
    add("--guidance-scale", type=float, default=2.5)
    add("--prompt", default="a large yellow star on a blue background")
    add("--seed", type=int, default=1)
    add("--rounds", type=int, default=3, help="processes of each peer that count (default: %(default)s)")
    add("--repeats", type=int, default=3, help="pairs of runs in each process (default: %(default)s)")
    add("--environments", type=Path, default=REPOSITORY / ".venv-peers", metavar="DIR")
    add("--python", action="append", default=[], metavar="PEER=EXECUTABLE", help="an environment that is there")
    add("--pictures", type=Path, default=REPOSITORY / "out/peers", metavar="DIR", help="where the pictures are kept")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def settings(args: argparse.Namespace, picture: Path) -> dict[str, Any]:
    """What a worker is told."""
    return {
        "bundle": str(Path(args.bundle).resolve()),
        "checkpoint": str(Path(args.checkpoint).resolve()),
        "picture": str(picture),
        "prompt": args.prompt,
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "height": args.height,
        "width": args.width,
        "long": args.steps,
        "short": args.short,
        "repeats": args.repeats,
        "threads": physical_cores(),
    }


def make_environment(folder: Path, packages: list[str]) -> Path:
    """The Python of a virtual environment with these packages, made unless it is there."""
    python = folder / "bin/python"
    done = folder / "installed"
    if not done.exists():
        print(f"installing {' '.join(packages)} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], cwd=REPOSITORY, check=True)
        done.touch()
    return python


def measure(python: str, peer: str, told: dict[str, Any]) -> Run:
    """Run a worker to its end.  SystemExit if it fails."""
    environment = installed() | {"OMP_NUM_THREADS": str(told["threads"]), "HF_HUB_OFFLINE": "1"}
    environment |= {"CI": "true"}  # else OpenVINO, imported by itself, reports that to its makers
    environment |= {"PYTHONPATH": str(REPOSITORY / "runtime")} if PEERS[peer] in ("ours", "openvino") else {}
    command = [python, str(WORKER), peer, json.dumps(told)]
    with tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            cold = time.perf_counter() - started
            pairs = [json.loads(line) for line in process.stdout]
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not pairs:
            errors.seek(0)
            raise SystemExit(f"{peer} failed:\n{errors.read()[-3000:]}")
    memory = usage.ru_maxrss * 1024 / 1e6  # Linux counts in KiB
    return Run(cold, min(short for short, _ in pairs), min(long for _, long in pairs), memory)


def row(peer: str, runs: list[Run], steps: int, folder: Path, python: str) -> Row:
    likeness = psnr(folder / f"{peer}.png", folder / f"{REFERENCE}.png")
    step = (min(r.long for r in runs) - min(r.short for r in runs)) / steps
    memory = statistics.median(r.memory for r in runs)
    return Row(peer, likeness, step, min(r.cold for r in runs), memory, install_size(python))


def psnr(one: Path, other: Path) -> float | None:
    """Peak signal-to-noise ratio in dB of two pictures of 8 bits a channel; NaN where one is missing."""
    import numpy as np
    from PIL import Image

    if not (one.exists() and other.exists()):
        return float("nan")
    a, b = (np.asarray(Image.open(path).convert("RGB"), np.float64) for path in (one, other))
    error = float(((a - b) ** 2).mean())
    return float(10 * np.log10(255**2 / error)) if error else None


def install_size(python: str) -> float:
    """Megabytes of the packages in an environment, but for pip and its like."""
    listing = subprocess.run([python, "-I", "-c", SIZES], check=True, stdout=subprocess.PIPE)
    sizes: dict[str, int] = json.loads(listing.stdout)
    return sum(size for name, size in sizes.items() if name not in BARE) / 1e6


def table(args: argparse.Namespace, rows: list[Row]) -> str:
    """In markdown, under what it was measured on."""
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    head = f"{args.width} × {args.height}, {args.steps} steps, float32; {machine}"
    lines = [head, "", "| | picture | step | cold start | peak memory | install |", "|---|---|---|---|---|---|"]
    for r in rows:
        likeness = "reference" if r.peer == REFERENCE else "equal" if r.psnr is None else f"{r.psnr:.1f} dB"
        step = f"{r.step * 1e3:.1f} ms" if r.step < 1 else f"{r.step:.2f} s"
        lines.append(f"| {r.peer} | {likeness} | {step} | {r.cold:.2f} s | {r.memory:.0f} MB | {r.install:.0f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
