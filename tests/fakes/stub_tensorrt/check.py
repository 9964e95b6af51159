"""TensorRT 8.5's own ONNX parser over the graphs that a bundle has for it, without a GPU; see network.cpp.

    python check.py FOLDER BUNDLE...       FOLDER has the program that build.py makes

For every graph: the parser takes it; what it makes of it computes what ONNX Runtime computes from the graph itself; in
float16, the layers that are to be held to float32 by their names are all that make float32, and none makes integers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from as_onnx import FLOAT, HALF, INT32, Json, as_onnx

GRAPHS = ("*/model_trt-legacy.onnx", "sampler_step/*.onnx", "pixels/*.onnx")
MARK = "@float32"  # sd_export.tensorrt_.plan.FLOAT32
FREE = ("identity", "constant", "shuffle")  # kinds of layers that are not computed in any precision
SIZES = {"batch": 2, "timesteps": 2, "sequence_length": 154, "N": 3, "E": 5, "F": 6, "h": 8, "w": 12}
SIZES |= {"B": 2, "S": 2, "T": 4, "R": 4}
SIDES = {"latent_height": 16, "latent_width": 24, "height": 64, "width": 96, "H": 16, "W": 24}
LIMITS = {FLOAT: 1e-5, HALF: 2e-2}  # |parsed - graph| / |graph|


def main() -> int:
    folder, failed = Path(sys.argv[1]), 0
    for bundle in map(Path, sys.argv[2:]):
        graphs = [path for pattern in GRAPHS for path in sorted(bundle.glob(pattern))]
        for graph in graphs:
            complaints = list(check(folder, graph))
            failed += bool(complaints)
            for line in complaints:
                print(f"  {line}")
    return int(failed > 0)


def check(folder: Path, graph: Path) -> Iterator[str]:
    """What is wrong with a graph; a line about it is printed."""
    network, weights = parse(folder, graph)
    print(f"{graph}: {len(network['layers'])} layers", end="", flush=True)
    yield from network["objections"]
    if not network["parsed"]:
        yield "the parser does not take it"
        print()
        return
    half = any(layer["output"]["type"] == HALF for layer in network["layers"])
    if half:
        yield from held_to_float32(network["layers"])
    error = difference(graph, as_onnx(network, weights))
    print(f", differs by {error:.1e}")
    if not error <= LIMITS[HALF if half else FLOAT]:
        yield "it computes something else than the graph"


def parse(folder: Path, graph: Path) -> tuple[Json, np.ndarray]:
    """The network that the parser makes, and the bytes of its weights."""
    paths = os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])
    with tempfile.TemporaryDirectory() as place:
        command = [str(folder / "network"), f"{place}/network", str(graph)]
        done = subprocess.run(
            command, env=os.environ | {"LD_LIBRARY_PATH": paths}, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1):
            raise SystemExit(f"{graph}: {done.stderr}")
        weights = np.fromfile(f"{place}/network.bin", np.uint8)
        return json.loads(Path(f"{place}/network.json").read_text()), weights


def held_to_float32(layers: list[Json]) -> Iterator[str]:
    for layer in layers:
        name, kind, made = layer["name"], layer["kind"], layer["output"]["type"]
        if MARK in name and made == INT32:
            yield f"{name} makes integers and would be held to float32"
        if MARK not in name and made == FLOAT and kind not in FREE:
            yield f"{name} makes float32 and is not held to it"


def difference(graph: Path, parsed: onnx.ModelProto) -> float:
    """The largest relative difference of an output."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    ours = onnxruntime.InferenceSession(str(graph), options, providers=providers)
    theirs = onnxruntime.InferenceSession(parsed.SerializeToString(), options, providers=providers)
    feeds = dict(inputs(onnx.load(graph, load_external_data=False)))
    narrow = {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in feeds.items()}
    pairs = zip(ours.run(None, feeds), theirs.run(None, narrow), strict=True)
    worst = 0.0
    for expected, got in pairs:
        wanted, had = expected.astype(np.float64), got.astype(np.float64)
        assert wanted.shape == had.shape
        worst = max(worst, float(np.sqrt(np.mean((had - wanted) ** 2)) / (np.sqrt(np.mean(wanted**2)) or 1)))
    return worst


def inputs(model: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(0)
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [dim.dim_value or (SIZES | SIDES)[dim.dim_param] for dim in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if np.issubdtype(dtype, np.integer):
            yield value.name, random.integers(0, 3, shape).astype(dtype)
        else:
            yield value.name, random.standard_normal(shape).astype(dtype)


if __name__ == "__main__":
    sys.exit(main())
