"""One attention block as torch traces it, small, with the heads of the real networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from sd_export.graphs.forms import FORMS, rewrite
from sd_export.graphs.precision import to_float16
from sd_runtime.bundle.manifest import ShapeRange

HEADS, TOKENS, PROMPT = 2, 256, 77


def attention_block(head: int, *, causal: bool = False) -> onnx.ModelProto:
    """`out` = x + self-attention + attention to the prompt: tokens (B, 256, C) and a prompt (B, 77, C), C = 2 · head.

    causal: instead the self-attention of a text encoder: tokens (B, 77, C), each of which sees those before it."""
    width, tokens = HEADS * head, PROMPT if causal else TOKENS
    nodes: list[onnx.NodeProto] = []
    random = np.random.default_rng(0)
    constants = {
        "apart": np.array([0, 0, HEADS, head]),
        "together": np.array([0, 0, width]),
        "mask": np.tril(np.ones((1, 1, PROMPT, PROMPT), bool)),
    }
    _attention(nodes, constants, random, width, "self", "tokens", "tokens", mask=causal)
    if not causal:
        _attention(nodes, constants, random, width, "cross", "self/out", "prompt")
    nodes[-1].output[0] = "out"
    inputs = {"tokens": ["batch", tokens, width]} | ({} if causal else {"prompt": ["batch", PROMPT, width]})
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, inputs["tokens"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if causal or name != "mask"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _attention(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],  # type: ignore[type-arg]
    random: np.random.Generator,
    width: int,
    name: str,
    source: str,
    keys: str,
    *,
    mask: bool = False,
) -> None:
    """Append source + attention(source, keys), as `name`/out."""
    for part in ("q", "k", "v", "o"):
        constants[f"{name}/{part}"] = (random.standard_normal((width, width)) / width**0.5).astype(np.float32)

    def add(kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{name}/{output}"], f"{name}/{output}", **attributes))
        return f"{name}/{output}"

    heads = []
    for part, taken in (("q", source), ("k", keys), ("v", keys)):
        projected = add("MatMul", [taken, f"{name}/{part}"], f"{part}/projected")
        apart = add("Reshape", [projected, "apart"], f"{part}/apart")
        heads.append(add("Transpose", [apart], f"{part}/heads", perm=[0, 2, 1, 3]))
    attended = add("Attention", [*heads, "mask"] if mask else heads, "attended")
    rows = add("Transpose", [attended], "rows", perm=[0, 2, 1, 3])
    together = add("Reshape", [rows, "together"], "together")
    projected = add("MatMul", [together, f"{name}/o"], "projected")
    add("Add", [source, projected], "out")


def write_block(folder: Path, form: str, head: int, *, causal: bool = False) -> tuple[Path, dict[str, ShapeRange]]:
    """The block in one of the forms for TensorRT, in half precision, and the shapes of one and two rows that it is to
    be built for.  "trt-f32" is `trt-basic` in float32; `plain` as it was traced, in float32."""
    proto = attention_block(head, causal=causal)
    model = ir.from_proto(proto)
    if form in ("trt-basic", "trt-legacy"):
        to_float16(model)
    if form != "plain":
        rewrite(model, FORMS["trt-basic" if form == "trt-f32" else form])
    path = folder / f"{form}-{head}-{causal}.onnx"
    ir.save(model, path)
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim][1:] for value in proto.graph.input}
    return path, {name: ShapeRange((1, *rest), (2, *rest), (2, *rest)) for name, rest in shapes.items()}
