"""The ONNX parser of TensorRT 10 or later over the graphs that a bundle has for it, without a GPU; see network.cpp.

    python check_newer.py PARSER HEADERS BUNDLE [FORM ...]

PARSER is a libnvonnxparser.so, of an installed TensorRT or made from the parser's sources, HEADERS folders, separated
by colons, with TensorRT's headers of that version, the parser's and CUDA's.  FORM: trt-basic (from 10.0 on), trt-bf16
(from 10.15 on); by default both.  For every graph: the parser takes it, and a strongly typed network has no objection
to its layers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from build import build_newer
from check import parse

FORMS = ("trt-basic", "trt-bf16")


def main(parser: str, headers: str, bundle: str, *forms: str) -> int:
    names = [f"*/model_{form}.onnx" for form in forms or FORMS]
    graphs = [path for name in (*names, "sampler_step/*.onnx", "pixels/*.onnx") for path in Path(bundle).glob(name)]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        build_newer(Path(folder), Path(parser).resolve(), *map(Path, headers.split(":")))
        for graph in sorted(graphs):
            network, _ = parse(Path(folder), graph)
            taken = "taken" if network["parsed"] else "not taken"
            print(f"{graph}: {taken}, {len(network['layers'])} layers")
            for objection in network["objections"]:
                print(f"  {objection}")
            failed += not network["parsed"] or bool(network["objections"])
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
