"""Matrix products of the same input as one product, whose result is split.

    Q, K, V of a self-attention             one packed product for each attention
    K, V of the prompt, in all blocks       one for each width that the blocks have
    the timestep's projections, likewise    one for each width

A GPU spends longer on starting each of the small ones than on computing it.  The weights stay apart in the file, as
the other forms and whoever changes one of them want them; they are put side by side when the graph is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from .editor import Editor, attribute, needed, only_user, other_output, static

UNSCALED = {"alpha": 1.0, "beta": 1.0, "transA": 0}  # of Gemm, as torch traces it
MOST_PARTS = 32  # ONNX Runtime splits into up to as many by one kernel, which needs nothing copied to the GPU


@dataclass(frozen=True)
class _Product:
    """`result` = source · weight + bias."""

    node: ir.Node
    result: ir.Value
    weight: ir.Value
    bias: ir.Value | None


def merge_products(editor: Editor) -> None:
    """All that have their input and the shape of their weights in common."""
    groups: dict[tuple[object, ...], list[_Product]] = {}
    for node in (*editor.nodes("MatMul"), *editor.nodes("Gemm")):
        product = _read(node)
        if product is not None:
            kind = (node.op_type, product.bias is None, attribute(node, "transB", 0), tuple(_shape(product.weight)))
            groups.setdefault((node.inputs[0], *kind), []).append(product)
    for products in groups.values():
        for start in range(0, len(products), MOST_PARTS):
            part = products[start : start + MOST_PARTS]
            if len(part) > 1:
                _merge(editor, part)
    editor.finish()


def _read(node: ir.Node) -> _Product | None:
    """`node` as a product by weights of the network's own, if it is one, with its bias if nothing else is added."""
    _, weight, *biases = (needed(v) for v in node.inputs)
    own = all(v.is_initializer() for v in (weight, *biases)) and len(_shape(weight)) == 2
    if not own or [attribute(node, name, default) for name, default in UNSCALED.items()] != [*UNSCALED.values()]:
        return None
    result = node.outputs[0]
    if biases:
        return _Product(node, result, weight, biases[0])
    addition = only_user(result, "Add")
    if addition is not None:
        for addend in map(needed, addition.inputs):
            if addend.is_initializer() and _shape(addend) == [static(result, -1)]:
                return _Product(node, addition.outputs[0], weight, addend)
    return _Product(node, result, weight, None)


def _merge(editor: Editor, products: Sequence[_Product]) -> None:
    first = products[0]
    node, result = first.node, first.result
    editor.before(node)
    transposed = attribute(node, "transB", 0)
    weight = _side_by_side(editor, [p.weight for p in products], 0 if transposed else 1, "weights")
    biases = [p.bias for p in products if p.bias is not None]
    bias = _side_by_side(editor, biases, 0, "biases") if biases else None
    shape = [*_shape(result)[:-1], static(result, -1) * len(products)]
    source = node.inputs[0]
    if node.op_type == "Gemm":
        total = editor.add("Gemm", [source, weight, bias], "merged", like=result, shape=shape, transB=transposed)
    else:
        total = editor.add("MatMul", [source, weight], "merged", like=result, shape=shape)
        if bias is not None:
            total = editor.add("Add", [total, bias], "biased", like=total)
    names = [str(number) for number in range(1, len(products))]
    part = editor.add("Split", [total], "part", like=result, also=names, axis=-1, num_outputs=len(products))
    for position, product in enumerate(products):
        editor.replace(product.result, other_output(part, position))


def _side_by_side(editor: Editor, values: Sequence[ir.Value], axis: int, name: str) -> ir.Value:
    shape = _shape(values[0])
    shape[axis] = static(values[0], axis) * len(values)
    return editor.add("Concat", values, name, like=values[0], shape=shape, axis=axis)


def _shape(value: ir.Value) -> list[int | ir.SymbolicDim]:
    assert value.shape is not None
    return list(value.shape)
