"""The float16 pass: what becomes float16, what must not, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto
from sd_export.graphs.precision import to_float16
from sd_runtime.errors import ExportError
from sd_runtime.tensor import Array


def value_types(path: Path) -> tuple[onnx.GraphProto, dict[str, int]]:
    graph = onnx.load(path, load_external_data=False).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return graph, types | {i.name: i.data_type for i in graph.initializer}


def test_timestep_is_float32_up_to_the_first_product(traced: Callable[..., Any]) -> None:
    graph, types = value_types(traced("unet", "fp16").graph)
    sinusoids = [node for node in graph.node if node.op_type in ("Sin", "Cos")]
    assert len(sinusoids) == 2
    assert {types[name] for node in sinusoids for name in (*node.input, *node.output)} == {TensorProto.FLOAT}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul", "Attention")]
    assert {types[node.input[0]] for node in products} == {TensorProto.FLOAT16}


def test_edges_stay_float32(traced: Callable[..., Any], component: str) -> None:
    graph, types = value_types(traced(component, "fp16").graph)
    edge = {types[value.name] for value in (*graph.input, *graph.output)}
    assert edge <= {TensorProto.FLOAT, TensorProto.INT64}


def test_few_casts(traced: Callable[..., Any], component: str) -> None:
    """One for each float input and output and one after the sinusoids; the text encoder casts ids to int32, too."""
    graph, _ = value_types(traced(component, "fp16").graph)
    casts = [node.name for node in graph.node if node.op_type == "Cast" and "to_float" in node.name]
    assert len(casts) == {"text_encoder": 2, "unet": 4, "vae_decoder": 2, "vae_encoder": 2}[component]


def test_weights_are_half_the_size(traced: Callable[..., Any], component: str) -> None:
    single, half = (traced(component, precision).weights.stat().st_size for precision in ("fp32", "fp16"))
    assert half < 0.75 * single


def converted(text: str, **weights: Array) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    model = ir.from_proto(proto)
    for name, content in weights.items():
        tensor = ir.Tensor(content, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(content.shape), const_value=tensor)
        model.graph.register_initializer(value)
        for free in {v for node in model.graph for v in node.inputs if v is not None and v.name == name} - {value}:
            free.replace_all_uses_with(value)
    to_float16(model)
    return model


def run(model: ir.Model, **feeds: Array) -> Array:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    output: Array = session.run(None, feeds)[0]
    return output


def test_upcasts_in_the_graph_are_harmless() -> None:
    """Stable Diffusion 2.x computes its attention scores in float32 where the checkpoint asks for it."""
    model = converted(
        """upcast (float[n, 4] x) => (float[n, 4] y) <float[n, 4] a, float[n, 4] b, float[n, 4] c, float[n, 4] d> {
            a = Add(x, x)
            b = Cast<to = 1>(a)
            c = Softmax(b)
            d = Cast<to = 1>(c)
            y = Mul(d, a)
        }"""
    )
    x = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    exponentials = np.exp(2 * x)
    expected = exponentials / exponentials.sum(-1, keepdims=True) * 2 * x
    got = run(model, x=x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=3e-3, atol=1e-3)


def test_masks_are_clamped_not_infinite() -> None:
    model = converted(
        "masked (float[2, 2] x) => (float[2, 2] y) <float[2, 2] s> { s = Add(x, mask)  y = Softmax(s) }",
        mask=np.array([[0, np.finfo(np.float32).min], [0, 0]], np.float32),
    )
    got = run(model, x=np.zeros((2, 2), np.float32))
    np.testing.assert_allclose(got, [[1, 0], [0.5, 0.5]], atol=1e-3)


def test_floats_made_from_integers_stay_float32_until_a_product() -> None:
    """100 000 does not fit into float16; as float32 it can be scaled down first."""
    model = converted(
        """island (int64[2, 2] n) => (float[2, 2] y) <float[2, 2] f, float[2, 2] g> {
            f = Cast<to = 1>(n)
            g = Mul(f, scale)
            y = MatMul(g, identity)
        }""",
        scale=np.array(1e-5, np.float32),
        identity=np.eye(2, dtype=np.float32),
    )
    got = run(model, n=np.array([[100_000, 0], [200_000, 300_000]]))
    np.testing.assert_allclose(got, [[1, 0], [2, 3]], rtol=1e-3)


def test_weights_beyond_float16_are_refused() -> None:
    text = "big (float[1, 2] x) => (float[1, 2] y) { y = MatMul(x, weight) }"
    model = converted(text, weight=np.array([[1, 7e4], [0, 1]], np.float32))
    with pytest.raises(ExportError, match="weight weight exceeds float16: got 70000"):
        model.graph.initializers["weight"].const_value.numpy()


def test_a_constant_may_serve_float32_and_float16() -> None:
    """The exporter stores equal constants once, wherever they are used."""
    model = converted(
        """shared (float[1] timestep, float[1] x) => (float[1] y) <float[1] t, float[1] a> {
            t = Mul(timestep, factor)
            a = Mul(x, factor)
            y = Add(t, a)
        }""",
        factor=np.array([300], np.float32),
    )
    got = run(model, timestep=np.array([999], np.float32), x=np.array([2], np.float32))
    np.testing.assert_allclose(got, [300_300], rtol=1e-6)  # 299 700 is beyond float16
