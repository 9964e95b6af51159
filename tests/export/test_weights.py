"""The weights file: an ordinary safetensors that the graph references by offset."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from safetensors import safe_open
from sd_export.graphs.weights import LINE, PAGE, SMALL
from sd_runtime.tensor import Array


def tensors(path: Path) -> dict[str, Array]:
    with safe_open(str(path), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def header(path: Path) -> tuple[int, dict[str, Any]]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length, json.loads(content[8 : 8 + length])


def test_weights_are_the_checkpoint_s(traced: Callable[..., Any], component: str) -> None:
    network = traced(component, "fp32")
    state = {name.removeprefix("unet."): t.numpy() for name, t in network.module.state_dict().items()}
    stored = tensors(network.weights)
    for name, content in stored.items():
        key, transposed = name.removesuffix(".T"), name.endswith(".T")
        if key in state:
            np.testing.assert_array_equal(content, state[key].T if transposed else state[key])
    constants = {name for name in stored if name.removesuffix(".T") not in state}
    assert constants <= {"text_model.embeddings/Add.1", "time_proj/Mul.1"}  # positions and frequencies, folded
    large = {name for name, content in state.items() if content.nbytes >= SMALL and content.dtype == np.float32}
    assert large - {name.removesuffix(".T") for name in stored} <= {"text_model.embeddings.position_embedding.weight"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graph_points_into_the_file(traced: Callable[..., Any], component: str, precision: str) -> None:
    network = traced(component, precision)
    stored, content = tensors(network.weights), network.weights.read_bytes()
    initializers = onnx.load(network.graph, load_external_data=False).graph.initializer
    outside = [i for i in initializers if uses_external_data(i)]
    assert {i.name for i in outside} == set(stored)
    for initializer in outside:
        where = ExternalDataInfo(initializer)
        assert where.location == "model.safetensors"
        array = stored[initializer.name]
        assert content[where.offset : where.offset + where.length] == array.tobytes()
        assert tuple(initializer.dims) == array.shape
    inside = [i for i in initializers if not uses_external_data(i)]
    assert all(i.data_type != onnx.TensorProto.FLOAT or len(i.raw_data) < SMALL for i in inside)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_layout(traced: Callable[..., Any], component: str, precision: str) -> None:
    path = traced(component, precision).weights
    begin, entries = header(path)
    assert begin % PAGE == 0
    spans = [entry["data_offsets"] for entry in entries.values()]
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert begin + spans[-1][1] == path.stat().st_size
    whole = [(last - first) % LINE == 0 for first, last in spans]
    assert whole == sorted(whole, reverse=True)  # tensors of whole lines first: all of them aligned
