"""Graphs for other processors, made to run on ONNX Runtime's CPU provider.

Its CUDA-only operators are defined in standard ones, as ONNX functions, after their own documentation in
onnxruntime/docs/ContribOperators.md: numbers are those of float32 arithmetic, results have the type of the first input.
bfloat16, which the provider has no kernels for, becomes float32 that was rounded where it was cast.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

DOMAIN = "reference"
_HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : 23]>'

_GROUP_NORM = """
GroupNorm <groups, epsilon, activation> (X, gamma, beta) => (Y)
{
    channels_first = Transpose<perm = [0, 3, 1, 2]>(X)
    wide = Cast<to = 1>(channels_first)
    normal = GroupNormalization<num_groups: int = @groups, epsilon: float = @epsilon>(wide, gamma, beta)
    sigmoid = Sigmoid(normal)
    silu = Mul(normal, sigmoid)
    number = Constant<value_int: int = @activation>()
    active = Cast<to = 9>(number)
    chosen = Where(active, silu, normal)
    channels_last = Transpose<perm = [0, 2, 3, 1]>(chosen)
    Y = CastLike(channels_last, X)
}
"""
_SKIP_GROUP_NORM = f"""
SkipGroupNorm <groups, epsilon, activation> (X, gamma, beta, skip) => (Y, S)
{{
    shape = Shape(X)
    batch = Shape<start = 0, end = 1>(X)
    channels = Shape<start = 3, end = 4>(X)
    rest = Constant<value_ints = [-1]>()
    flat = Concat<axis = 0>(batch, rest, channels)
    rows = Reshape(X, flat)
    skipped = Reshape(skip, flat)
    sum = Add(rows, skipped)
    S = Reshape(sum, shape)
    Y = {DOMAIN}.GroupNorm<groups: int = @groups, epsilon: float = @epsilon, activation: int = @activation>
        (S, gamma, beta)
}}
"""
_BIAS_ADD = """
BiasAdd (X, bias, skip) => (Y)
{
    biased = Add(X, bias)
    Y = Add(biased, skip)
}
"""
_BIAS_SPLIT_GELU = """
BiasSplitGelu (X, bias) => (Y)
{
    biased = Add(X, bias)
    left, right = Split<axis = -1, num_outputs = 2>(biased)
    gelu = Gelu(right)
    Y = Mul(left, gelu)
}
"""
_NHWC_CONV = """
NhwcConv <group, strides, pads, dilations> (X, W) => (Y)
{
    channels_first = Transpose<perm = [0, 3, 1, 2]>(X)
    weight = Transpose<perm = [0, 3, 1, 2]>(W)
    result = Conv<group: int = @group, strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations>
        (channels_first, weight)
    Y = Transpose<perm = [0, 2, 3, 1]>(result)
}
"""
_BIASED_NHWC_CONV = f"""
BiasedNhwcConv <group, strides, pads, dilations> (X, W, B) => (Y)
{{
    result = {DOMAIN}.NhwcConv
        <group: int = @group, strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations>(X, W)
    Y = Add(result, B)
}}
"""
_BIASED_SKIP_GROUP_NORM = f"""
BiasedSkipGroupNorm <groups, epsilon, activation> (X, gamma, beta, skip, bias) => (Y, S)
{{
    biased = Add(X, bias)
    Y, S = {DOMAIN}.SkipGroupNorm<groups: int = @groups, epsilon: float = @epsilon, activation: int = @activation>
        (biased, gamma, beta, skip)
}}
"""
_USING = _HEADER.replace("[", f'["{DOMAIN}" : 1, ')
BIASED = {"NhwcConv": 3, "SkipGroupNorm": 5}  # inputs of those with a bias: functions know no optional inputs
FUNCTIONS = {
    "GroupNorm": _HEADER + _GROUP_NORM,
    "SkipGroupNorm": _USING + _SKIP_GROUP_NORM,
    "BiasedSkipGroupNorm": _USING + _BIASED_SKIP_GROUP_NORM,
    "NhwcConv": _HEADER + _NHWC_CONV,
    "BiasedNhwcConv": _USING + _BIASED_NHWC_CONV,
    "BiasAdd": _HEADER + _BIAS_ADD,
    "BiasSplitGelu": _HEADER + _BIAS_SPLIT_GELU,
}


def with_functions(graph: bytes) -> bytes:
    """The graph with its CUDA-only operators replaced by the functions above; its weights stay outside."""
    model = onnx.load_from_string(graph)
    for node in model.graph.node:
        if node.domain == "com.microsoft" and node.op_type in FUNCTIONS:
            node.domain = DOMAIN
            if node.op_type == "SkipGroupNorm" and len(node.output) == 1:
                node.output.append(f"{node.name}/sum")  # nor outputs
            if len(node.input) == BIASED.get(node.op_type):
                node.op_type = f"Biased{node.op_type}"
    model.functions.extend(onnx.parser.parse_function(text) for text in FUNCTIONS.values())
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    serialized: bytes = model.SerializeToString()
    return serialized


def in_float32(graph: bytes) -> bytes:
    """The bfloat16 graph, computed in float32 between its casts to bfloat16."""
    model = onnx.load_from_string(graph)
    graph, narrow, wide = model.graph, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Cast" and node.attribute[0].i == narrow:
            (name,) = node.output
            node.output[0] = f"{name}/rounded"
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/rounded"], [name], to=wide))
    del graph.node[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        if tensor.data_type == narrow:
            numbers = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, tensor.name))
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    serialized: bytes = model.SerializeToString()
    return serialized
