"""A graph of opset 23 in operators of opset 17, as TensorRT 8.5 and 8.6 parse it.

Their parsers know no Attention and no Gelu, 8.5 no normalisations beyond an InstanceNormalization that calls cuDNN,
and they ignore Shape's `start` and `end` (they would return the whole shape).  Their networks are weakly typed: in
which precision a layer computes is told layer by layer, so the float32 ones carry FLOAT32 in their names.
After TensorRT's parser, github.com/onnx/onnx-tensorrt, release/8.5-GA, builtin_op_importers.cpp.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ..names import FLOAT32
from .attention import decompose_attention
from .editor import NUMPY, Editor, attribute, needed, set_attributes
from .normalisation import group_norm_by_means, layer_norm_by_means

OPSET, IR_VERSION = 17, 8
NEWER_ATTRIBUTES = {
    "Resize": ("antialias", "keep_aspect_ratio_policy"),
    "Split": ("num_outputs",),
    "Cast": ("saturate",),
}


def to_legacy(editor: Editor) -> None:
    """Lower everything, and say in their names which layers of a float16 graph compute in float32."""
    decompose_attention(editor)
    group_norm_by_means(editor)
    layer_norm_by_means(editor)
    _gelu_by_erf(editor)
    _whole_shapes(editor)
    for node in editor.graph:
        _spell_as_before(editor, node)
    editor.finish()
    _name_float32(editor)


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
    if node.op_type == "ReduceMean":
        axes = needed(node.inputs[1]).const_value
        assert axes is not None
        set_attributes(node, {"axes": axes.numpy().tolist()})
        node.resize_inputs(1)
    if node.op_type == "Squeeze" and len(node.inputs) == 1:
        node.resize_inputs(2)
        node.replace_input_with(1, editor.integers(0))  # torch squeezes sizes read from shapes: (1,) to ()


def _name_float32(editor: Editor) -> None:
    """Mark the nodes of a float16 graph that make float32: the timestep's sinusoids, the norms' statistics."""
    made = [node for node in editor.graph if node.outputs[0].dtype == ir.DataType.FLOAT]
    if len(made) == sum(node.outputs[0].dtype in NUMPY for node in editor.graph):
        return  # the whole graph is float32
    for node in made:
        node.name = f"{node.name}{FLOAT32}"
