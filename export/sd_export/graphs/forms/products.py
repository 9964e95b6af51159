"""Matrix products of the same input as one product, whose result is split.

    Q, K, V of a self-attention             one packed product for each attention
    K, V of the prompt, in all blocks       one for each width that the blocks have
    the timestep's projections, likewise    one for each width

Either the results lie side by side, or, where attentions read them, one after the other: there the next head must be as
far away as the first head of the next picture is from the last of this one.  A GPU spends longer on starting each of
the small ones than on computing it.  The weights stay apart in the file, as the other forms and whoever changes one of
them want them; they are put together when the graph is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from .editor import Editor, attribute, needed, only_user, other_output, sizes, static

UNSCALED = {"alpha": 1.0, "beta": 1.0, "transA": 0}  # of Gemm, as torch traces it
MOST_PARTS = 32  # ONNX Runtime splits into up to as many by one kernel, which needs nothing copied to the GPU
MOST_STACKED = 10  # TensorRT lays the results of up to ten out for their attentions by one kernel, of more by one each


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
            kind = (node.op_type, product.bias is None, attribute(node, "transB", 0), tuple(sizes(product.weight)))
            groups.setdefault((node.inputs[0], *kind), []).append(product)
    for products in groups.values():
        for start in range(0, len(products), MOST_PARTS):
            part = products[start : start + MOST_PARTS]
            if len(part) > 1:
                _merge(editor, part)
    editor.finish()


def stack_products(editor: Editor) -> None:
    """Those of an input (S, B, C) of the network, the prompt, without a bias: one batched product for each shape of
    weights."""
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in editor.nodes("MatMul"):
        source, weight = (needed(v) for v in node.inputs)
        if _is_input(source) and len(sizes(source)) == 3 and len(sizes(weight)) == 2:
            groups.setdefault((source, *sizes(weight)), []).append(node)
    for nodes in groups.values():
        for start in range(0, len(nodes), MOST_STACKED):
            part = nodes[start : start + MOST_STACKED]
            if len(part) > 1:
                _stack(editor, part)
    editor.finish()


def _is_input(value: ir.Value) -> bool:
    """Whether `value` is an input of the graph, in another type or order."""
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Transpose"):
        value = needed(node.inputs[0])
        node = value.producer()
    return value.is_graph_input()


def _read(node: ir.Node) -> _Product | None:
    """`node` as a product by weights of the network's own, if it is one, with its bias if nothing else is added."""
    _, weight, *biases = (needed(v) for v in node.inputs)
    own = all(v.is_initializer() for v in (weight, *biases)) and len(sizes(weight)) == 2
    if not own or [attribute(node, name, default) for name, default in UNSCALED.items()] != [*UNSCALED.values()]:
        return None
    result = node.outputs[0]
    if biases:
        return _Product(node, result, weight, biases[0])
    addition = only_user(result, "Add")
    if addition is not None:
        for addend in map(needed, addition.inputs):
            if addend.is_initializer() and sizes(addend) == [static(result, -1)]:
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
    shape = [*sizes(result)[:-1], static(result, -1) * len(products)]
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
    shape = sizes(values[0])
    shape[axis] = static(values[0], axis) * len(values)
    return editor.add("Concat", values, name, like=values[0], shape=shape, axis=axis)


def _stack(editor: Editor, nodes: Sequence[ir.Node]) -> None:
    """(S, B, C) · (n, 1, C, D) → n times (S, B, D)."""
    source, result = needed(nodes[0].inputs[0]), nodes[0].outputs[0]
    editor.before(nodes[0])
    axes, shape = editor.integers(0, 1), [1, 1, *sizes(needed(nodes[0].inputs[1]))]
    weights = [
        editor.add("Unsqueeze", [node.inputs[1], axes], f"weight/{number}", like=node.inputs[1], shape=shape)
        for number, node in enumerate(nodes)
    ]
    weight = editor.add("Concat", weights, "weights", like=weights[0], shape=[len(nodes), *shape[1:]], axis=0)
    total = editor.add("MatMul", [source, weight], "stacked", like=result, shape=[len(nodes), *sizes(result)])
    names = [str(number) for number in range(1, len(nodes))]
    shape = [1, *sizes(result)]
    part = editor.add("Split", [total], "part", like=result, shape=shape, also=names, axis=0, num_outputs=len(nodes))
    for position, node in enumerate(nodes):
        one = editor.add(
            "Squeeze", [other_output(part, position), editor.integers(0)], f"result/{position}", like=result
        )
        editor.replace(node.outputs[0], one)
