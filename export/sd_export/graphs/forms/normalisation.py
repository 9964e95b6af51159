"""Group and layer normalisation for runtimes that lack the operators.

Group normalisation: Wu & He 2018, arXiv 1803.08494, equation 7; layer normalisation: Ba et al. 2016, arXiv 1607.06450,
equation 4.  Whatever the graph's type, mean and variance are float32: a float16 sum of squares is where pictures turn
black.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .editor import NUMPY, Editor, Shape, attribute, dtype_of, needed, static

FLOAT = ir.DataType.FLOAT


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


def group_norm_by_means(editor: Editor) -> None:
    """Group normalisation in operators that every runtime has."""
    for node in editor.nodes("GroupNormalization"):
        editor.before(node)
        source = needed(node.inputs[0])
        grouped = _grouped(editor, source, int(attribute(node, "num_groups")))
        normal = _standardised(editor, grouped, float(attribute(node, "epsilon")))
        _scale_and_shift(editor, node, _as_before(editor, normal, source), per_channel=True)
    editor.finish()


def layer_norm_by_means(editor: Editor) -> None:
    """Layer normalisation over the last axis in operators that every runtime has."""
    for node in editor.nodes("LayerNormalization"):
        assert attribute(node, "axis", -1) == -1
        editor.before(node)
        normal = _standardised(editor, needed(node.inputs[0]), float(attribute(node, "epsilon")))
        _scale_and_shift(editor, node, normal, per_channel=False)
    editor.finish()


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
    mean = editor.add("ReduceMean", [wide], "statistics/mean", like=wide, shape=one, axes=[-1], keepdims=1)
    centred = editor.add("Sub", [wide, mean], "statistics/centred", like=wide)
    squares = editor.add("Mul", [centred, centred], "statistics/squares", like=wide)
    variance = editor.add("ReduceMean", [squares], "statistics/variance", like=mean, axes=[-1], keepdims=1)
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
