"""A graph of opset 23 in operators of opset 17, as TensorRT 8.5 and 8.6 parse it.

Their parsers know no Attention and no Gelu, 8.5 no normalisations beyond an InstanceNormalization that calls cuDNN;
they ignore Shape's `start` and `end` (and would return the whole shape), and 64-bit inputs become 32-bit behind the
graph's back.  After TensorRT's parser, github.com/onnx/onnx-tensorrt, release/8.5-GA, builtin_op_importers.cpp.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from .attention import decompose_attention
from .editor import Editor, attribute, needed, set_attributes
from .normalisation import group_norm_by_means, layer_norm_by_means

OPSET, IR_VERSION = 17, 8
NEWER_ATTRIBUTES = {
    "Resize": ("antialias", "keep_aspect_ratio_policy"),
    "Split": ("num_outputs",),
    "Cast": ("saturate",),
}


def to_legacy(editor: Editor) -> None:
    """Lower everything; the graph's inputs are 32-bit afterwards."""
    decompose_attention(editor)
    group_norm_by_means(editor)
    layer_norm_by_means(editor)
    _gelu_by_erf(editor)
    _whole_shapes(editor)
    for node in editor.graph:
        _spell_as_before(editor, node)
    for value in editor.graph.inputs:
        if value.dtype == ir.DataType.INT64:
            _make_32_bit(value)
    editor.finish()


def _gelu_by_erf(editor: Editor) -> None:
    """x · (1 + erf(x / √2)) / 2, in the order in which engine builders recognise it.  Hendrycks & Gimpel 2016,
    arXiv 1606.08415, section 2."""
    for node in editor.nodes("Gelu"):
        assert attribute(node, "approximate", "none") == "none"
        editor.before(node)
        x = needed(node.inputs[0])
        shrunk = editor.add("Div", [x, editor.scalar(math.sqrt(2), x)], "shrunk", like=x)
        erf = editor.add("Erf", [shrunk], "erf", like=x)
        raised = editor.add("Add", [erf, editor.scalar(1, x)], "raised", like=x)
        product = editor.add("Mul", [x, raised], "product", like=x)
        editor.replace(node.outputs[0], editor.add("Mul", [product, editor.scalar(0.5, x)], "halved", like=x))
    editor.finish()


def _whole_shapes(editor: Editor) -> None:
    """Shape(x)[start : end] as a Shape and a Slice."""
    for node in editor.nodes("Shape"):
        if not node.attributes:
            continue
        source = needed(node.inputs[0])
        assert source.shape is not None
        start, end = attribute(node, "start", 0), attribute(node, "end", len(source.shape))
        editor.before(node)
        whole = editor.add("Shape", [source], "whole", dtype=ir.DataType.INT64, shape=[len(source.shape)])
        bounds = [editor.integers(start), editor.integers(end), editor.integers(0)]
        editor.replace(node.outputs[0], editor.add("Slice", [whole, *bounds], "part", like=node.outputs[0]))
    editor.finish()


def _spell_as_before(editor: Editor, node: ir.Node) -> None:
    """Drop what opset 17 does not know; say what TensorRT's old parser does not infer."""
    for name in NEWER_ATTRIBUTES.get(node.op_type, ()):
        node.attributes.pop(name, None)
    if node.op_type == "Reshape":
        set_attributes(node, {"allowzero": 0})  # sizes of 0 do not occur
    if node.op_type == "Squeeze" and len(node.inputs) == 1:
        node.resize_inputs(2)
        node.replace_input_with(1, editor.integers(0))  # torch squeezes sizes read from shapes: (1,) to ()


def _make_32_bit(value: ir.Value) -> None:
    """Make an integer tensor, and what is only another view of it, 32-bit."""
    value.dtype = ir.DataType.INT32
    for node, position in value.uses():
        if node.op_type == "Reshape" and position == 0:
            _make_32_bit(node.outputs[0])
