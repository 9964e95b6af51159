"""Attention as other runtimes want it: taken apart where they have no such operator, or as their own.

ONNX's Attention (opset 23) takes Q, K and V as (B, heads, S, D) and an optional mask; torch traces it between a Reshape
and a Transpose for each, from (B, S, heads · D).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from sd_runtime.errors import ExportError

from .editor import NUMPY, Editor, attribute, cast, dtype_of, needed, only_user, producer, static


def decompose_attention(editor: Editor, *, softmax: ir.DataType | None = None) -> None:
    """softmax(Q Kᵀ · scale + mask) V in single operators, the softmax in the type `softmax`; None is the graph's own.

    The scale is applied to Q, the smaller side, and K is transposed once, straight from its heads: engine builders
    recognise this form and fuse it again where they can.  With a float32 softmax they do so as well, and what they
    compute in float32 between the products of a fused attention they then compute in an unfused one, too."""
    for node in editor.nodes("Attention"):
        query, key, value = (needed(v) for v in node.inputs[:3])
        editor.before(node)
        scaled = editor.add("Mul", [query, editor.scalar(scale_of(node), query)], "scaled", like=query)
        scores = cast(editor, _scores(editor, scaled, key), softmax or dtype_of(query), "scores/wide")
        if (mask := mask_of(node)) is not None:
            scores = editor.add("Where", [mask, scores, _minus_infinity(editor, scores)], "masked", like=scores)
        weights = editor.add("Softmax", [scores], "softmax", like=scores, axis=-1)
        weights = cast(editor, weights, dtype_of(query), "softmax/narrow")
        result = editor.add("MatMul", [weights, value], "result", like=node.outputs[0])
        editor.replace(node.outputs[0], result)
    editor.finish()


def use_multi_head_attention(editor: Editor) -> None:
    """ONNX Runtime's MultiHeadAttention, straight from the projections' (B, S, heads · D) and back to it.

    Q, K and V are three inputs: its flash and cuDNN kernels read them in place as they are, but unpack a packed QKV
    first, which costs what splitting it does."""
    for node in editor.nodes("Attention"):
        sources = [before_heads(needed(v)) for v in node.inputs[:3]]
        merged = after_heads(node.outputs[0])
        if merged is None or any(source is None for source in sources):
            continue
        query = needed(node.inputs[0])
        editor.before(node)
        inputs: list[ir.Value | None] = [*sources]
        if (mask := mask_of(node)) is not None:
            inputs += [None, None, _bias(editor, mask, query)]  # neither a bias nor a mask by length
        attended = editor.add(
            "MultiHeadAttention",
            inputs,
            "fused",
            like=merged,
            domain="com.microsoft",
            num_heads=static(query, 1),
            scale=scale_of(node),
        )
        editor.replace(merged, attended)
    editor.finish()


def scale_of(node: ir.Node) -> float:
    """Of the scores.  ExportError: the attention does more than scale and mask them, which no rewrite here knows."""
    for name in ("is_causal", "softcap"):
        if attribute(node, name, 0):
            raise ExportError(f"{node.name}: {name}", got=attribute(node, name), accepted="0")
    return float(attribute(node, "scale") or static(needed(node.inputs[0]), 3) ** -0.5)


def mask_of(node: ir.Node) -> ir.Value | None:
    """The boolean mask, as small as it is given: torch expands it to the batch, which broadcasting does as well."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    expand = producer(mask, "Expand")
    return expand.inputs[0] if expand is not None else mask


def _scores(editor: Editor, scaled: ir.Value, key: ir.Value) -> ir.Value:
    """Q Kᵀ: (B, heads, S, L)."""
    assert scaled.shape is not None and key.shape is not None
    split = producer(key, "Transpose")
    assert split is not None
    batch, heads, length, width = key.shape
    *outer, along, across = attribute(split, "perm")
    source, shape = [needed(split.inputs[0])], [batch, heads, width, length]
    transposed = editor.add("Transpose", source, "key", like=key, shape=shape, perm=[*outer, across, along])
    shape = [*scaled.shape[:3], length]
    return editor.add("MatMul", [scaled, transposed], "scores", like=scaled, shape=shape)


def _minus_infinity(editor: Editor, like: ir.Value) -> ir.Value:
    """The most negative finite number: a row that is masked altogether gives no NaN."""
    dtype = dtype_of(like)
    lowest = {ir.DataType.FLOAT: -3.0e38, ir.DataType.FLOAT16: -65504.0, ir.DataType.BFLOAT16: -3.0e38}[dtype]
    return editor.scalar(lowest, like)


def _bias(editor: Editor, mask: ir.Value, query: ir.Value) -> ir.Value:
    """The same mask as numbers to add: 0 where attention may look, hugely negative where not."""
    assert mask.const_value is not None
    allowed = mask.const_value.numpy()
    lowest = _minus_infinity(editor, query).const_value
    assert lowest is not None
    dtype = dtype_of(query)
    return editor.constant(
        f"{mask.name}/bias/{dtype.name.lower()}", np.where(allowed, 0, lowest.numpy()).astype(NUMPY[dtype])
    )


def before_heads(value: ir.Value) -> ir.Value | None:
    """(B, S, heads · D) that `value` (B, heads, S, D) was split from."""
    transpose = producer(value, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    return reshape.inputs[0] if reshape is not None else None


def after_heads(value: ir.Value) -> ir.Value | None:
    """(B, S, heads · D) that `value` (B, heads, S, D) is merged to."""
    transpose = only_user(value, "Transpose")
    reshape = only_user(transpose.outputs[0], "Reshape") if transpose is not None else None
    return reshape.outputs[0] if reshape is not None else None
