"""Group and layer normalisation for runtimes that lack the operators.

Group normalisation: Wu & He 2018, arXiv 1803.08494, equation 7; layer normalisation: Ba et al. 2016, arXiv 1607.06450,
equation 4.  Whatever the graph's type, mean and variance are float32: a float16 sum of squares is where pictures turn
black.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from .editor import NUMPY, Editor, Shape, attribute, dtype_of, needed, sizes, static

FLOAT = ir.DataType.FLOAT
TYPICAL = {"latent_height": 64, "latent_width": 64, "height": 512, "width": 512}  # sizes of axes that vary
SMALL = 10240  # numbers in a group that TensorRT normalises by one kernel, between loading and storing them once


def group_norm_by_instance_norm(editor: Editor) -> None:
    """A group is an instance once the picture is reshaped to (B, groups, everything else)."""
    for node in editor.nodes("GroupNormalization"):
        editor.before(node)
        source, groups = needed(node.inputs[0]), int(attribute(node, "num_groups"))
        grouped = _grouped(editor, source, groups)
        dtype = dtype_of(source)
        ones = editor.constant(f"ones/{groups}/{dtype.name.lower()}", np.ones(groups, NUMPY[dtype]))
        zeros = editor.constant(f"zeros/{groups}/{dtype.name.lower()}", np.zeros(groups, NUMPY[dtype]))
        normal = editor.add(
            "InstanceNormalization", [grouped, ones, zeros], "normal", like=grouped, epsilon=attribute(node, "epsilon")
        )
        _scale_and_shift(editor, node, _as_before(editor, normal, source), per_channel=True)
    editor.finish()


def group_norm_by_means(editor: Editor, nodes: Iterable[ir.Node] | None = None) -> None:
    """Group normalisation in operators that every runtime has: all, or those of `nodes`."""
    for node in editor.nodes("GroupNormalization") if nodes is None else nodes:
        editor.before(node)
        source = needed(node.inputs[0])
        grouped = _grouped(editor, source, int(attribute(node, "num_groups")))
        normal = _standardised(editor, grouped, float(attribute(node, "epsilon")))
        _scale_and_shift(editor, node, _as_before(editor, normal, source), per_channel=True)
    editor.finish()


def small_activated_groups(editor: Editor) -> list[ir.Node]:
    """The group normalisations before an activation whose groups are small at 512×512 pixels.

    Written as means, TensorRT computes these, the activation, and the sum or concatenation before by one kernel.  Its
    own kernel for groups of any size needs a second one, which clears its counters, and takes nothing else in."""
    positions: dict[ir.Value, float] = {}
    for value in editor.graph.inputs:
        if len(sizes(value)) == 4:
            positions[value] = math.prod(TYPICAL.get(str(axis), 1) for axis in sizes(value)[2:])
    found = []
    for node in editor.graph:
        known = [positions[v] for v in node.inputs if v in positions]
        if not known or node.op_type == "Shape":
            continue
        scale = {"Conv": 1 / math.prod(attribute(node, "strides", ())), "Resize": 4}.get(node.op_type, 1)
        positions |= dict.fromkeys(node.outputs, known[0] * scale)
        if node.op_type == "GroupNormalization" and _is_activated(node):
            source = needed(node.inputs[0])
            if static(source, 1) // int(attribute(node, "num_groups")) * positions[source] <= SMALL:
                found.append(node)
    return found


def layer_norm_by_means(editor: Editor) -> None:
    """Layer normalisation over the last axis in operators that every runtime has."""
    for node in editor.nodes("LayerNormalization"):
        assert attribute(node, "axis", -1) == -1
        editor.before(node)
        normal = _standardised(editor, needed(node.inputs[0]), float(attribute(node, "epsilon")))
        _scale_and_shift(editor, node, normal, per_channel=False)
    editor.finish()


def _is_activated(node: ir.Node) -> bool:
    return any(user.op_type == "Sigmoid" for user, _ in node.outputs[0].uses())


def _grouped(editor: Editor, source: ir.Value, groups: int) -> ir.Value:
    """(B, C, …) → (B, groups, C / groups · …)."""
    assert source.shape is not None
    shape = [source.shape[0], groups, None]
    return editor.add("Reshape", [source, editor.integers(0, groups, -1)], "grouped", like=source, shape=shape)


def _as_before(editor: Editor, normal: ir.Value, source: ir.Value) -> ir.Value:
    assert source.shape is not None
    shape = editor.add("Shape", [source], "shape", dtype=ir.DataType.INT64, shape=[len(source.shape)])
    return editor.add("Reshape", [normal, shape], "normal/as_before", like=source)


def _standardised(editor: Editor, value: ir.Value, epsilon: float) -> ir.Value:
    """(x - mean) / sqrt(variance + ε) over the last axis, in float32 inside, back in the type it came in."""
    assert value.shape is not None
    one: Shape = [*value.shape[:-1], 1]
    wide = value
    if value.dtype != FLOAT:
        wide = editor.add("Cast", [value], "statistics/float", like=value, dtype=FLOAT, to=FLOAT.value)
    last = editor.integers(-1)
    mean = editor.add("ReduceMean", [wide, last], "statistics/mean", like=wide, shape=one)
    centred = editor.add("Sub", [wide, mean], "statistics/centred", like=wide)
    squares = editor.add("Mul", [centred, centred], "statistics/squares", like=wide)
    variance = editor.add("ReduceMean", [squares, last], "statistics/variance", like=mean)
    positive = editor.add("Add", [variance, editor.scalar(epsilon, wide)], "statistics/positive", like=mean)
    deviation = editor.add("Sqrt", [positive], "statistics/deviation", like=mean)
    normal = editor.add("Div", [centred, deviation], "statistics/normal", like=wide)
    if value.dtype == FLOAT:
        return normal
    return editor.add("Cast", [normal], "statistics/narrow", like=value, to=dtype_of(value).value)


def _scale_and_shift(editor: Editor, node: ir.Node, normal: ir.Value, *, per_channel: bool) -> None:
    """normal · weight + bias takes the place of `node`; weight and bias are (C,), C the axis after the batch or the
    last."""
    assert normal.shape is not None
    weight, bias = needed(node.inputs[1]), needed(node.inputs[2])
    if per_channel:
        weight, bias = (_column(editor, v, len(normal.shape), n) for v, n in ((weight, "weight"), (bias, "bias")))
    scaled = editor.add("Mul", [normal, weight], "scaled", like=normal)
    editor.replace(node.outputs[0], editor.add("Add", [scaled, bias], "shifted", like=normal))


def _column(editor: Editor, value: ir.Value, rank: int, name: str) -> ir.Value:
    """(C,) → (C, 1, …), which broadcasts along the axis after the batch of a tensor of `rank` axes."""
    axes = range(1, rank - 1)
    return editor.add(
        "Unsqueeze", [value, editor.integers(*axes)], name, like=value, shape=[static(value, 0), *(1 for _ in axes)]
    )
