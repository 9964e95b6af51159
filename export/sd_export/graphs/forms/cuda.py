"""The graph as ONNX Runtime's CUDA provider runs it best: its own fused operators, channels last around them.

    MatMuls or Gemms of one input        → one, and its result split: packed Q, K and V, for example
    Attention                            → MultiHeadAttention
    Conv, Resize                         → NhwcConv, Resize, channels last
    Add, GroupNormalization, SiLU        → SkipGroupNorm or GroupNorm, channels last, the activation inside, and the
                                           biases of the convolutions that are added
    MatMul's bias, residual, norm        → SkipLayerNormalization, which also hands on the sum
    MatMul's or Conv's bias, residual    → BiasAdd
    MatMul's bias, split, Gelu, Mul      → BiasSplitGelu

The transposes between what is channels last cancel when ONNX Runtime optimises the graph; those of the weights, which
lie in the file channels first as the other forms want them, are folded when it loads it.  The provider's own option
prefer_nhwc does the same to plain convolutions, but then moves the computation of shapes to the GPU, which costs a copy
to the host and back for each of them and rules CUDA graphs out.  SkipLayerNormalization sums in float16 unless the
provider is created with enable_skip_layer_norm_strict_mode.  What each kernel takes:
onnxruntime/contrib_ops/cuda/{diffusion,bert} and core/providers/cuda/nn/conv.cc.
"""

from __future__ import annotations

import onnx_ir as ir

from .attention import use_multi_head_attention
from .editor import Editor, attribute, cast, dtype_of, needed, only_user, other_output, producer, static
from .products import merge_products

MICROSOFT = "com.microsoft"
SPLIT_GELU_WIDTHS = (1280, 2560, 5120)  # the ones that BiasSplitGelu is compiled for
CHANNELS_A_THREAD = 2  # of GroupNorm: a group's channels must be a multiple
NONE, SILU = 0, 1
WIDE = ir.DataType.FLOAT  # of GroupNorm's weights, and of sums of weights, which the CPU folds when it loads them


def to_cuda(editor: Editor) -> None:
    """All of the above; what does not fit a kernel is left to the provider's own operators."""
    merge_products(editor)
    use_multi_head_attention(editor)
    _skip_layer_norm(editor)
    _bias_add(editor)
    _bias_split_gelu(editor)
    _group_norm(editor)
    _convolution_bias_add(editor)
    _convolutions(editor)
    _resizes(editor)


def _skip_layer_norm(editor: Editor) -> None:
    for node in editor.nodes("LayerNormalization"):
        total = needed(node.inputs[0])
        addition = producer(total, "Add")
        if addition is None or _rank(total) != 3 or not _same_shapes(addition):
            continue
        (first, bias), skip = _biased_first(addition)
        _, gamma, beta = node.inputs
        wanted = _used_elsewhere(total, node)
        editor.before(node)
        normal = editor.add(
            "SkipLayerNormalization",
            [first, skip, gamma, beta, bias],
            "skip",
            like=total,
            domain=MICROSOFT,
            also=("", "", "sum" if wanted else ""),  # neither mean nor deviation
            epsilon=attribute(node, "epsilon"),
        )
        editor.replace(node.outputs[0], normal)
        if wanted:
            editor.replace(total, other_output(normal, 3))
    editor.finish()


def _bias_add(editor: Editor) -> None:
    for node in editor.nodes("Add"):
        if _rank(node.outputs[0]) != 3 or not _same_shapes(node):
            continue
        (first, bias), skip = _biased_first(node)
        if bias is not None:
            editor.before(node)
            total = editor.add("BiasAdd", [first, bias, skip], "biased", like=node.outputs[0], domain=MICROSOFT)
            editor.replace(node.outputs[0], total)
    editor.finish()


def _bias_split_gelu(editor: Editor) -> None:
    """(x + bias) split in two halves: left · gelu(right).  GEGLU: Shazeer 2020, arXiv 2002.05202, equation 6."""
    for node in editor.nodes("Gelu"):
        split, product = producer(node.inputs[0], "Split"), only_user(node.outputs[0], "Mul")
        if split is None or product is None or node.inputs[0] is not split.outputs[1]:
            continue
        first, bias = _biased(needed(split.inputs[0]))
        left = split.outputs[0]
        if bias is None or static(left, -1) not in SPLIT_GELU_WIDTHS or left not in product.inputs:
            continue
        editor.before(product)
        gated = editor.add("BiasSplitGelu", [first, bias], "gated", like=product.outputs[0], domain=MICROSOFT)
        editor.replace(product.outputs[0], gated)
    editor.finish()


def _group_norm(editor: Editor) -> None:
    for node in editor.nodes("GroupNormalization"):
        source, groups = needed(node.inputs[0]), int(attribute(node, "num_groups"))
        if static(source, 1) // groups % CHANNELS_A_THREAD:
            continue
        result, activation = _with_silu(node.outputs[0])
        editor.before(node)
        scale = zip(node.inputs[1:], ("gamma", "beta"), strict=True)
        gamma, beta = (cast(editor, needed(value), WIDE, name) for value, name in scale)
        options = {"groups": groups, "epsilon": attribute(node, "epsilon"), "activation": activation}
        first, skip = _addends(source)
        if skip is None:
            inputs = [_channels_last(editor, source, "input"), gamma, beta]
            normal = editor.add("GroupNorm", inputs, "normal", like=inputs[0], domain=MICROSOFT, **options)
        else:
            bias = _taken_bias(editor, first, skip)
            rows = skip if _rank(skip) == 2 else _channels_last(editor, skip, "skip")
            inputs = [_channels_last(editor, first, "input"), gamma, beta, rows, *([] if bias is None else [bias])]
            wanted = _used_elsewhere(source, node)
            also = ("sum",) if wanted else ()
            normal = editor.add(
                "SkipGroupNorm", inputs, "normal", like=inputs[0], domain=MICROSOFT, also=also, **options
            )
            if wanted:
                editor.replace(source, _channels_first(editor, other_output(normal, 1), source, "sum"))
        editor.replace(result, _channels_first(editor, normal, result, "output"))
    editor.finish()


def _taken_bias(editor: Editor, *addends: ir.Value) -> ir.Value | None:
    """The sum of the biases of the convolutions that make `addends`, taken from those that nothing else reads."""
    taken = []
    for value in addends:
        convolution, read_once = producer(value, "Conv"), len(value.uses()) == 1 and not value.is_graph_output()
        if convolution is not None and len(convolution.inputs) == 3 and read_once:
            taken.append(needed(convolution.inputs[2]))
            convolution.resize_inputs(2)
    if len(taken) < 2:
        return taken[0] if taken else None
    wide = [cast(editor, value, WIDE, f"bias/{number}") for number, value in enumerate(taken)]
    return cast(editor, editor.add("Add", wide, "bias", like=wide[0]), dtype_of(taken[0]), "bias/narrow")


def _convolution_bias_add(editor: Editor) -> None:
    """BiasAdd for residuals that no normalisation adds.  It takes (B, H · W, C)."""
    for node in editor.nodes("Add"):
        total = node.outputs[0]
        if _rank(total) != 4 or not _same_shapes(node):
            continue
        editor.before(node)
        addends = [needed(v) for v in node.inputs]
        bias = _taken_bias(editor, *addends)
        if bias is None:
            continue
        first, second = (_channels_last(editor, v, name) for v, name in zip(addends, ("first", "second"), strict=True))
        rows = [_rows(editor, value, name) for value, name in ((first, "first"), (second, "second"))]
        biased = editor.add("BiasAdd", [rows[0], bias, rows[1]], "biased", like=rows[0], domain=MICROSOFT)
        shape = editor.add("Shape", [second], "shape", dtype=ir.DataType.INT64, shape=[4])
        biased = editor.add("Reshape", [biased, shape], "nhwc", like=second)
        editor.replace(total, _channels_first(editor, biased, total, "output"))
    editor.finish()


def _convolutions(editor: Editor) -> None:
    """Their weights are (out, height, width, in) then."""
    for node in editor.nodes("Conv"):
        source, weight, *bias = (needed(v) for v in node.inputs)
        if _rank(source) != 4:
            continue
        editor.before(node)
        result = node.outputs[0]
        inputs = [_channels_last(editor, source, "input"), _channels_last(editor, weight, "weight"), *bias]
        shape = _moved_last(result)
        attributes = {name: value.value for name, value in node.attributes.items()}
        convolved = editor.add("NhwcConv", inputs, "nhwc", like=result, shape=shape, domain=MICROSOFT, **attributes)
        editor.replace(result, _channels_first(editor, convolved, result, "output"))
    editor.finish()


def _resizes(editor: Editor) -> None:
    """By scales or to sizes, one for each axis; nearest neighbours, which is all that these networks use."""
    for node in editor.nodes("Resize"):
        source, *unused, target = node.inputs
        if any(unused) or _rank(needed(source)) != 4:
            continue
        editor.before(node)
        result = node.outputs[0]
        last = editor.add("Gather", [target, editor.integers(0, 2, 3, 1)], "target", like=target, axis=0)
        inputs = [_channels_last(editor, needed(source), "input"), *unused, last]
        attributes = {name: value.value for name, value in node.attributes.items()}
        resized = editor.add("Resize", inputs, "nhwc", like=result, shape=_moved_last(result), **attributes)
        editor.replace(result, _channels_first(editor, resized, result, "output"))
    editor.finish()


def _with_silu(value: ir.Value) -> tuple[ir.Value, int]:
    """x · sigmoid(x) of `value`, if that is all that happens to it, and which activation that makes."""
    users = [node for node, _ in value.uses()]
    sigmoid = next((node for node in users if node.op_type == "Sigmoid"), None)
    product = only_user(sigmoid.outputs[0], "Mul") if sigmoid is not None else None
    if product is None or {*users} != {sigmoid, product}:
        return value, NONE
    return product.outputs[0], SILU


def _addends(total: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """What SkipGroupNorm adds itself: a tensor of the same shape, or a row of channels for each picture."""
    addition = producer(total, "Add")
    if addition is None or _rank(total) != 4:
        return total, None
    first, second = (needed(v) for v in addition.inputs)
    row = producer(second, "Unsqueeze")
    if row is not None and _rank(needed(row.inputs[0])) == 2 and static(needed(row.inputs[0]), 1) == static(total, 1):
        return first, row.inputs[0]
    return (first, second) if _same_shapes(addition) else (total, None)


def _channels_last(editor: Editor, value: ir.Value, name: str) -> ir.Value:
    """(B, C, H, W) → (B, H, W, C), or (B, C, L) → (B, L, 1, C)."""
    batch, *rest, channels = shape = _moved_last(value)
    if len(rest) == 2:
        return editor.add("Transpose", [value], f"{name}/nhwc", like=value, shape=shape, perm=[0, 2, 3, 1])
    flat = editor.add("Transpose", [value], f"{name}/nlc", like=value, shape=shape, perm=[0, 2, 1])
    shape = [batch, *rest, 1, channels]
    return editor.add("Unsqueeze", [flat, editor.integers(2)], f"{name}/nhwc", like=value, shape=shape)


def _moved_last(value: ir.Value) -> list[int | ir.SymbolicDim]:
    """The shape of `value` with axis 1 at its end."""
    assert value.shape is not None
    batch, channels, *rest = value.shape
    return [batch, *rest, channels]


def _rows(editor: Editor, value: ir.Value, name: str) -> ir.Value:
    """(B, H, W, C) → (B, H · W, C)."""
    assert value.shape is not None
    batch, _, _, channels = value.shape
    flat = editor.integers(0, -1, static(value, 3))
    return editor.add("Reshape", [value, flat], f"{name}/rows", like=value, shape=[batch, None, channels])


def _channels_first(editor: Editor, value: ir.Value, like: ir.Value, name: str) -> ir.Value:
    """The way back, to the shape of `like`."""
    if _rank(like) == 4:
        return editor.add("Transpose", [value], f"{name}/nchw", like=like, perm=[0, 3, 1, 2])
    assert like.shape is not None
    batch, channels, length = like.shape
    flat = editor.add("Squeeze", [value, editor.integers(2)], f"{name}/nlc", like=like, shape=[batch, length, channels])
    return editor.add("Transpose", [flat], f"{name}/ncl", like=like, perm=[0, 2, 1])


def _biased(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(x, bias) if `value` is x + bias and nothing else reads the sum; else (value, None)."""
    addition = producer(value, "Add")
    if addition is None or len(value.uses()) != 1:
        return value, None
    first, second = (needed(v) for v in addition.inputs)
    return (first, second) if second.is_initializer() and _rank(second) == 1 else (value, None)


def _biased_first(addition: ir.Node) -> tuple[tuple[ir.Value, ir.Value | None], ir.Value]:
    """The two addends: the one with a bias of its own, taken apart, and the other."""
    first, second = (needed(v) for v in addition.inputs)
    taken = _biased(first)
    if taken[1] is None and (other := _biased(second))[1] is not None:
        return other, first
    return taken, second


def _used_elsewhere(value: ir.Value, node: ir.Node) -> bool:
    """Whether anything but `node` reads `value`."""
    return value.is_graph_output() or any(user is not node for user, _ in value.uses())


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _same_shapes(addition: ir.Node) -> bool:
    first, second = (needed(v) for v in addition.inputs)
    return not first.is_initializer() and not second.is_initializer() and first.shape == second.shape
