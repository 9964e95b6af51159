"""A few words for growing nodes into an ONNX graph, so that a rewrite reads like the formula it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from sd_runtime.tensor import Array

Shape = ir.Shape | Sequence[int | ir.SymbolicDim | None] | None

NUMPY = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


class Editor:
    """Inserts nodes before the node last named by `before`, and takes the place of what was there.

    New nodes are named after the node they stand in for, so that an engine builder's complaint about
    `…/attn1/Attention/scores` still says which layer of which block it is about."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self._anchor: ir.Node | None = None

    def nodes(self, op_type: str, domain: str = "") -> list[ir.Node]:
        """All nodes of one operator, in the graph's order."""
        return [node for node in self.graph if node.op_type == op_type and node.domain == domain]

    def before(self, node: ir.Node) -> None:
        """Put the nodes that follow in front of `node`, and name them after it."""
        self._anchor = node

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: Shape = None,
        domain: str = "",
        also: Sequence[str] = (),
        **attributes: Any,
    ) -> ir.Value:
        """A new node; its first output, of the type and shape of `like` unless `dtype` and `shape` say otherwise.

        `also` names further outputs, which are of the same kind; those named "" are left out."""
        assert self._anchor is not None
        full_name = f"{self._anchor.name}/{name}"
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=1 + len(also), name=full_name)
        dtype = dtype or (like.dtype if like is not None else None)
        chosen = shape if shape is not None or like is None else like.shape
        for value, suffix in zip(node.outputs, (None, *also), strict=True):
            value.name = full_name if suffix is None else suffix and f"{full_name}/{suffix}"
            value.type = ir.TensorType(dtype) if dtype is not None else None
            value.shape = ir.Shape(chosen) if chosen is not None else None
        self.graph.insert_before(self._anchor, node)
        return node.outputs[0]

    def constant(self, name: str, array: Array) -> ir.Value:
        """An initializer, one for each name; the same name means the same numbers."""
        if name not in self.graph.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.tensor(array).dtype)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def scalar(self, number: float, like: ir.Value) -> ir.Value:
        """`number` as a constant of rank 0 and of `like`'s type."""
        dtype = dtype_of(like)
        return self.constant(f"{number:.9g}/{dtype.name.lower()}", np.array(number, NUMPY[dtype]))

    def integers(self, *numbers: int) -> ir.Value:
        """A constant (len(numbers),) int64: a shape, or axes."""
        return self.constant("integers/" + ",".join(map(str, numbers)), np.array(numbers, np.int64))

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` take the place and the name of `old`, which is left without users."""
        name = old.name
        old.name = f"{name}/replaced"
        new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def finish(self) -> None:
        """Drop the nodes and constants that nothing reads any more."""
        RemoveUnusedNodesPass()(self.model)


def dtype_of(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def needed(value: ir.Value | None) -> ir.Value:
    """An input that the operator always has."""
    assert value is not None
    return value


def static(value: ir.Value, axis: int) -> int:
    """The size of an axis that does not vary."""
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def sizes(value: ir.Value) -> list[int | ir.SymbolicDim]:
    """The shape as a list."""
    assert value.shape is not None
    return list(value.shape)


def cast(editor: Editor, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """`value` in the type `dtype`: itself if it is."""
    if value.dtype == dtype:
        return value
    return editor.add("Cast", [value], name, like=value, dtype=dtype, to=dtype.value)


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that reads `value`, if it is the only one, of this operator, and `value` is not a result."""
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type and not value.is_graph_output() else None


def other_output(first: ir.Value, position: int) -> ir.Value:
    """Another output of the node that makes `first`."""
    node = first.producer()
    assert node is not None
    return node.outputs[position]


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes `value`, if it is of this operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def set_attributes(node: ir.Node, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        node.attributes[name] = ir.convenience.convert_attribute(name, value)
