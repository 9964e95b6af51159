"""ONNX Runtime's CUDA-only operators, defined in standard ones as ONNX functions, so that its CPU provider runs them.

After the operators' own documentation, onnxruntime/docs/ContribOperators.md.  Numbers are those of float32 arithmetic;
results have the type of the first input.
"""

from __future__ import annotations

from pathlib import Path

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
FUNCTIONS = {
    "GroupNorm": _HEADER + _GROUP_NORM,
    "SkipGroupNorm": _HEADER.replace("[", f'["{DOMAIN}" : 1, ') + _SKIP_GROUP_NORM,
    "BiasAdd": _HEADER + _BIAS_ADD,
    "BiasSplitGelu": _HEADER + _BIAS_SPLIT_GELU,
}


def with_references(path: Path) -> bytes:
    """The graph in `path` with its CUDA-only operators replaced by the functions above; its weights stay outside."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.domain == "com.microsoft" and node.op_type in FUNCTIONS:
            node.domain = DOMAIN
            if node.op_type == "SkipGroupNorm" and len(node.output) == 1:
                node.output.append(f"{node.name}/sum")  # functions know no optional outputs
    model.functions.extend(onnx.parser.parse_function(text) for text in FUNCTIONS.values())
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    serialized: bytes = model.SerializeToString()
    return serialized
