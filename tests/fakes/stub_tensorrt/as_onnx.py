"""A network as network.cpp wrote it down → an ONNX model that computes the same, to run it with ONNX Runtime.

Operations and types by their numbers in NvInfer.h of TensorRT 8.5.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, INT32, BOOL, UINT8 = 0, 1, 3, 4, 5
ONNX_TYPES = {
    FLOAT: TensorProto.FLOAT,
    HALF: TensorProto.FLOAT16,
    INT32: TensorProto.INT32,
    BOOL: TensorProto.BOOL,
    UINT8: TensorProto.UINT8,
}
NUMPY_TYPES = {FLOAT: np.float32, HALF: np.float16, INT32: np.int32, BOOL: np.bool_, UINT8: np.uint8}
ACTIVATIONS = {0: "Relu", 1: "Sigmoid", 2: "Tanh", 8: "Clip"}
ELEMENTWISE = {
    0: "Add",
    1: "Mul",
    2: "Max",
    3: "Min",
    4: "Sub",
    5: "Div",
    6: "Pow",
    11: "Equal",
    12: "Greater",
    13: "Less",
}
UNARY = {0: "Exp", 2: "Sqrt", 4: "Abs", 5: "Neg", 6: "Sin", 7: "Cos", 19: "Erf", 20: "Not", 22: "Round"}
REDUCTIONS = {0: "ReduceSum", 2: "ReduceMax", 4: "ReduceMean"}

Json = dict[str, Any]


def as_onnx(network: Json, weights: np.ndarray) -> onnx.ModelProto:
    """`weights`: the bytes of the network's second file."""
    return _Writer(weights).model(network)


class _Writer:
    def __init__(self, weights: np.ndarray) -> None:
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._names: dict[int | None, str] = {None: ""}

    def model(self, network: Json) -> onnx.ModelProto:
        for tensor in network["inputs"]:
            self._names[tensor["id"]] = tensor["name"]
        waiting = deque(network["layers"])  # a layer may come before one that it reads from
        while waiting:
            layer = waiting.popleft()
            if any(tensor not in self._names for tensor in layer["inputs"]):
                waiting.append(layer)
                continue
            made = getattr(self, f"kind_{layer['kind']}")(layer, [self._names[i] for i in layer["inputs"]])
            self._names[layer["output"]["id"]] = made
        for tensor in network["outputs"]:
            self._nodes.append(helper.make_node("Identity", [self._names[tensor["id"]]], [tensor["name"]]))
        inputs, outputs = ([_declared(tensor) for tensor in network[side]] for side in ("inputs", "outputs"))
        graph = helper.make_graph(self._nodes, "parsed", inputs, outputs, self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def _add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def _constant(self, array: np.ndarray) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def _integers(self, numbers: list[float]) -> str:
        return self._constant(np.array(numbers, np.int64))

    def _weight(self, layer: Json, name: str, shape: list[int]) -> str:
        kind, start, count = layer["weights"][name]
        if not count:
            return ""
        dtype = np.dtype(NUMPY_TYPES[kind])
        return self._constant(self._weights[start : start + count * dtype.itemsize].view(dtype).reshape(shape))

    def _cast(self, name: str, kind: int) -> str:
        return self._add("Cast", name, to=kind)

    def kind_convolution(self, layer: Json, inputs: list[str]) -> str:  # convolution
        told = {name: [int(n) for n in numbers] for name, numbers in layer["told"].items()}
        (maps,), (groups,) = told["maps"], told["groups"]
        count = layer["weights"]["kernel"][2]
        shape = [maps, count // maps // int(np.prod(told["kernel"])), *told["kernel"]]
        parameters = [self._weight(layer, "kernel", shape), self._weight(layer, "bias", [maps])]
        pads = told["before"] + told["after"]
        options = {"strides": told["stride"], "dilations": told["dilation"], "pads": pads, "group": groups}
        return self._add("Conv", inputs[0], *filter(None, parameters), **options)

    def kind_activation(self, layer: Json, inputs: list[str]) -> str:  # activation
        operator, dtype = ACTIVATIONS[int(layer["told"]["type"][0])], NUMPY_TYPES[layer["output"]["type"]]
        limits = [self._constant(np.array(layer["told"][n][0], dtype)) for n in ("alpha", "beta") if operator == "Clip"]
        return self._add(operator, inputs[0], *limits)

    def kind_softmax(self, layer: Json, inputs: list[str]) -> str:  # softmax
        return self._add("Softmax", inputs[0], axis=int(layer["told"]["axes"][0]).bit_length() - 1)

    def kind_concatenation(self, layer: Json, inputs: list[str]) -> str:  # concatenation
        return self._add("Concat", *inputs, axis=int(layer["told"]["axis"][0]))

    def kind_elementwise(self, layer: Json, inputs: list[str]) -> str:  # of two tensors, element by element
        return self._add(ELEMENTWISE[int(layer["told"]["operation"][0])], *inputs)

    def kind_unary(self, layer: Json, inputs: list[str]) -> str:  # of one tensor, element by element
        return self._add(UNARY[int(layer["told"]["operation"][0])], *inputs)

    def kind_shuffle(self, layer: Json, inputs: list[str]) -> str:  # shuffle: transpose, reshape, transpose
        told, name = layer["told"], inputs[0]
        if "first" in told:
            name = self._add("Transpose", name, perm=[int(n) for n in told["first"]])
        if len(inputs) > 1:
            name = self._add("Reshape", name, self._cast(inputs[1], TensorProto.INT64))
        elif "reshape" in told:
            name = self._add("Reshape", name, self._integers(told["reshape"]))
        if "second" in told:
            name = self._add("Transpose", name, perm=[int(n) for n in told["second"]])
        return name

    def kind_reduction(self, layer: Json, inputs: list[str]) -> str:  # reduction
        told = layer["told"]
        operator, bits = REDUCTIONS[int(told["operation"][0])], int(told["axes"][0])
        axes = [axis for axis in range(bits.bit_length()) if bits >> axis & 1]
        keeps = int(told["keeps"][0])
        if operator == "ReduceSum":
            return self._add(operator, inputs[0], self._integers(list(map(float, axes))), keepdims=keeps)
        return self._add(operator, inputs[0], axes=axes, keepdims=keeps)

    def kind_gather(self, layer: Json, inputs: list[str]) -> str:  # gather
        return self._add("Gather", *inputs, axis=int(layer["told"]["axis"][0]))

    def kind_product(self, layer: Json, inputs: list[str]) -> str:  # matrix product
        rank = len(layer["output"]["shape"])
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        sides = [
            self._add("Transpose", name, perm=swapped) if how == 1 else name
            for name, how in zip(inputs, layer["told"]["operations"], strict=True)
        ]
        return self._add("MatMul", *sides)

    def kind_constant(self, layer: Json, inputs: list[str]) -> str:  # constant
        shape = layer["output"]["shape"]
        return self._weight(layer, "values", shape) or self._constant(
            np.zeros(shape, NUMPY_TYPES[layer["output"]["type"]])
        )

    def kind_identity(self, layer: Json, inputs: list[str]) -> str:  # identity, which changes types
        return self._cast(inputs[0], ONNX_TYPES[layer["output"]["type"]])

    def kind_slice(self, layer: Json, inputs: list[str]) -> str:  # slice; a stride of 0 repeats
        name = inputs[0]
        given = [*inputs[1:], "", "", ""][:3]
        starts, sizes, strides = (
            self._cast(tensor, TensorProto.INT64) if tensor else self._integers(layer["told"][kind])
            for tensor, kind in zip(given, ("start", "size", "stride"), strict=True)
        )
        for axis in range(len(layer["output"]["shape"])):
            here = self._constant(np.array(axis, np.int64))
            start, size, stride = (self._add("Gather", numbers, here) for numbers in (starts, sizes, strides))
            zero, one = (self._constant(np.array(n, np.int64)) for n in (0, 1))
            steps = self._add("Mul", self._add("Range", zero, size, one), stride)
            name = self._add("Gather", name, self._add("Add", steps, start), axis=axis)
        return name

    def kind_shape(self, layer: Json, inputs: list[str]) -> str:  # shape
        return self._cast(self._add("Shape", inputs[0]), TensorProto.INT32)

    def kind_resize(self, layer: Json, inputs: list[str]) -> str:  # resize
        told = layer["told"]
        assert (told.get("mode", [0.0]), told["coordinates"], told["rounding"]) == ([0.0], [1.0], [2.0])
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if len(inputs) > 1:
            return self._add("Resize", inputs[0], "", "", self._cast(inputs[1], TensorProto.INT64), **options)
        return self._add("Resize", inputs[0], "", self._constant(np.array(told["scales"], np.float32)), **options)

    def kind_choice(self, layer: Json, inputs: list[str]) -> str:  # choice
        return self._add("Where", *inputs)


def _declared(tensor: Json) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor["name"], ONNX_TYPES[tensor["type"]], None)
