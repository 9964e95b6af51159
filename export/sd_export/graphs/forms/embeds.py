"""The text encoder from token embeddings on."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from sd_runtime.errors import ExportError

from ...signature import Signature
from ..precision import cast

TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"  # (vocabulary, D): the table of input embeddings


def text_embeds(plain: Path, signature: Signature) -> ir.Model:
    """The text encoder in the file `plain`, from token embeddings on: its input replaces the result of the look-up."""
    model = ir.load(plain)
    graph = model.graph
    (spec,) = signature.inputs
    (ids,) = graph.inputs
    lookups = [node for node in graph if node.op_type == "Gather" and _first(node).name == TOKEN_EMBEDDING]
    if len(lookups) != 1:
        raise ExportError("look-ups of token embeddings in the text encoder", got=len(lookups), accepted="one")
    looked_up = lookups[0].outputs[0]
    embeds = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=looked_up.shape)
    hidden = embeds
    if looked_up.dtype == ir.DataType.FLOAT16:
        node = cast(embeds, ir.DataType.FLOAT16)
        graph.insert_before(graph[0], node)
        hidden = node.outputs[0]
    looked_up.replace_all_uses_with(hidden)
    for node in [node for node in graph if node.op_type == "Shape" and _first(node) is ids]:
        assert node.attributes["end"].as_int() <= 2  # batch and length, which the embeddings have too
        node.replace_input_with(0, embeds)
    names = [spec.name for spec in signature.outputs]
    graph.outputs[:] = [value for value in graph.outputs if value.name in names]
    graph.inputs[:] = [embeds]
    RemoveUnusedNodesPass()(model)
    assert not ids.uses()
    return model


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
