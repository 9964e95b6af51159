"""Transformer blocks over pixels, as TensorRT launches the fewest kernels for them.

    1×1 convolution next to tokens          → matrix product of the tokens
    tokens (B, S, C) between attentions     → (S, B, C)

A fused attention takes heads as (B · heads, S, D) with one stride from each to the next.  In (B, S, C) the last head of
one picture and the first of the next are further apart than two heads of one picture; in (S, B, C) they are not, and
nothing is transposed around the attentions.  Whatever else a transformer block computes, it computes along the last
axis.  Found by counting what TensorRT for RTX launches: scripts/count_launches.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .attention import after_heads, before_heads
from .editor import Editor, attribute, needed, only_user, producer, set_attributes, sizes, static

TOKENS_FIRST = (1, 0, 2)  # (B, S, C) ↔ (S, B, C)
SPLIT_HEADS = (1, 2, 0, 3)  # (S, B, heads, D) → (B, heads, S, D)
MERGE_HEADS = (2, 0, 1, 3)  # and back
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
ELEMENTWISE = ("Add", "Mul", "Gelu", "Sigmoid", "Cast")

Uses = dict[ir.Value, Sequence[tuple[ir.Node, int]]]  # who reads a value, and as which input


def project_tokens(editor: Editor) -> None:
    """1×1 convolutions right before pixels become tokens, and right after tokens became pixels."""
    for node in editor.nodes("Conv"):
        if not _by_pixel(node):
            continue
        source, result = needed(node.inputs[0]), node.outputs[0]
        after, before = only_user(result, "Transpose"), producer(source, "Transpose")
        tokens = only_user(after.outputs[0], "Reshape") if after is not None else None
        pixels = producer(before.inputs[0], "Reshape") if before is not None else None
        if tokens is not None and after is not None and attribute(after, "perm") == CHANNELS_LAST:
            editor.before(tokens)
            last = _transposed(editor, source, CHANNELS_LAST, "input/nhwc")
            shape = editor.integers(0, -1, static(source, 1))
            rows = editor.add("Reshape", [last, shape], "input/tokens", like=tokens.outputs[0])
            editor.replace(tokens.outputs[0], _product(editor, node, rows))
        elif pixels is not None and before is not None and attribute(before, "perm") == CHANNELS_FIRST:
            editor.before(node)
            rows = _product(editor, node, needed(pixels.inputs[0]))
            last = editor.add("Reshape", [rows, pixels.inputs[1]], "output/nhwc", like=pixels.outputs[0])
            editor.replace(result, _transposed(editor, last, CHANNELS_FIRST, "output/nchw"))
    editor.finish()


def tokens_first(editor: Editor) -> None:
    """All values around the attentions that hold tokens, if pixels are among them; the text encoder's sequences are so
    short that other kernels transpose them in passing."""
    region = _Region(editor.nodes("Attention"))
    if not region.has_pixels or any(value.is_graph_output() for value in region.inside):
        return
    entries, exits = region.take_entries(), region.exits()
    for value in region.inside:
        value.shape = ir.Shape(_permuted(value, TOKENS_FIRST))
    for edges, name in ((entries, "tokens_first"), (exits, "batch_first")):
        for value, uses in edges.items():
            editor.before(uses[0][0])
            transposed = _transposed(editor, value, TOKENS_FIRST, f"{name}/{uses[0][1]}")
            for user, position in uses:
                user.replace_input_with(position, transposed)
    for reshape in region.splits:
        heads = reshape.outputs[0]
        _reshape(editor, reshape, 0, 0, static(heads, 2), static(heads, 3))
        heads.shape = ir.Shape(_permuted(heads, (1, 0, 2, 3)))
        for transpose, _ in heads.uses():
            set_attributes(transpose, {"perm": SPLIT_HEADS})
    for reshape in region.merges:
        heads = needed(reshape.inputs[0])
        _reshape(editor, reshape, 0, 0, static(reshape.outputs[0], 2))
        heads.shape = ir.Shape(_permuted(heads, (1, 0, 2, 3)))
        set_attributes(_made(heads), {"perm": MERGE_HEADS})
    editor.finish()


class _Region:
    """The values (B, S, C) that attentions read and make, and all that is computed from or to them along the last axis.

    splits   the Reshapes of Q, K and V to heads
    merges   the Reshapes of the results from heads"""

    def __init__(self, attentions: Sequence[ir.Node]) -> None:
        self.inside: dict[ir.Value, None] = {}
        self.splits: dict[ir.Node, None] = {}
        self.merges: dict[ir.Node, None] = {}
        for node in attentions:
            heads = [needed(v) for v in node.inputs[:3]]
            sources, merged = [before_heads(v) for v in heads], after_heads(node.outputs[0])
            if merged is None or None in sources:
                continue
            self.inside |= dict.fromkeys(needed(v) for v in (*sources, merged))
            self.splits |= dict.fromkeys(_made(needed(_made(v).inputs[0])) for v in heads)
            self.merges[_made(merged)] = None
        self._grow()
        self._outer = [value for value in self.inside if not self._makes(value.producer())]
        self.has_pixels = any(map(_were_pixels, self._outer))

    def take_entries(self) -> Uses:
        """The values that come from elsewhere, and what reads them here; after that they are no longer inside.  Pixels
        come in after their projection: the norm that follows transposes them in passing."""
        found: Uses = {}
        for value in self._outer:
            del self.inside[value]
            if _were_pixels(value) and (product := only_user(value, "MatMul")) is not None:
                value = product.outputs[0]
                del self.inside[value]
                if (biased := only_user(value, "Add")) is not None and 1 in (
                    len(sizes(needed(v))) for v in biased.inputs
                ):
                    value = biased.outputs[0]
                    del self.inside[value]
            found[value] = [use for use in value.uses() if self._reads(use[0])]
        return found

    def exits(self) -> Uses:
        """The values inside that are read elsewhere, and what reads them there."""
        uses = {value: [use for use in value.uses() if not self._reads(use[0])] for value in self.inside}
        return {value: outside for value, outside in uses.items() if outside}

    def _grow(self) -> None:
        waiting = [*self.inside]
        while waiting:
            value = waiting.pop()
            nodes = (value.producer(), *(user for user, _ in value.uses()))
            for node in nodes:
                if node is not None and _along_last(node):
                    new = [v for v in (*node.inputs, *node.outputs) if v is not None and _is_tokens(v)]
                    waiting += [v for v in new if v not in self.inside]
                    self.inside |= dict.fromkeys(new)

    def _makes(self, node: ir.Node | None) -> bool:
        return node is not None and (_along_last(node) or node in self.merges)

    def _reads(self, node: ir.Node) -> bool:
        return _along_last(node) or node in self.splits


def _along_last(node: ir.Node) -> bool:
    """Whether a node with tokens (B, S, C) computes the same, transposed, from tokens (S, B, C)."""
    if node.op_type == "MatMul":
        first, second = (len(sizes(needed(v))) for v in node.inputs)
        return (first, second) == (3, 2)
    if node.op_type in ("LayerNormalization", "Split"):
        return _is_tokens(node.outputs[0]) and attribute(node, "axis") in (-1, 2)
    return node.op_type in ELEMENTWISE and _is_tokens(node.outputs[0])


def _is_tokens(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 3


def _were_pixels(value: ir.Value) -> bool:
    """Whether `value` (B, H · W, C) is a reshaped (B, H, W, C)."""
    reshape = producer(value, "Reshape")
    return reshape is not None and len(sizes(needed(reshape.inputs[0]))) == 4


def _by_pixel(node: ir.Node) -> bool:
    """Whether a convolution computes each pixel from this pixel alone, and as many channels as there were."""
    out, into, *kernel = sizes(needed(node.inputs[1]))
    moves = {*attribute(node, "strides", ()), attribute(node, "group", 1)} != {1} or any(attribute(node, "pads", ()))
    return kernel == [1, 1] and out == into and not moves


def _product(editor: Editor, convolution: ir.Node, rows: ir.Value) -> ir.Value:
    """The tokens `rows` (B, S, C) by the weights (C, C, 1, 1) of a convolution, and its bias added."""
    _, weight, *bias = (needed(v) for v in convolution.inputs)
    channels = sizes(weight)[:2]
    flat = editor.add("Squeeze", [weight, editor.integers(2, 3)], "weight/flat", like=weight, shape=channels)
    weight = editor.add("Transpose", [flat], "weight", like=weight, shape=channels, perm=[1, 0])
    product = editor.add("MatMul", [rows, weight], "product", like=rows)
    return editor.add("Add", [product, *bias], "biased", like=rows) if bias else product


def _reshape(editor: Editor, node: ir.Node, *shape: int) -> None:
    """Reshape to `shape`, in which 0 is the size that there was."""
    node.replace_input_with(1, editor.integers(*shape))
    set_attributes(node, {"allowzero": 0})


def _transposed(editor: Editor, value: ir.Value, order: tuple[int, ...], name: str) -> ir.Value:
    return editor.add("Transpose", [value], name, like=value, shape=_permuted(value, order), perm=order)


def _permuted(value: ir.Value, order: tuple[int, ...]) -> list[int | ir.SymbolicDim]:
    return [sizes(value)[axis] for axis in order]


def _made(value: ir.Value) -> ir.Node:
    """The node that makes `value`."""
    node = value.producer()
    assert node is not None
    return node
