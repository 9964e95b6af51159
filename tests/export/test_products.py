"""Matrix products of one input become one product and a split, and the numbers stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from sd_export.graphs.forms.editor import Editor
from sd_export.graphs.forms.products import MOST_PARTS, merge_products
from sd_runtime.tensor import Array

HEADER = '<ir_version: 10, opset_import: ["" : 23]> main (float[2, 4] x, float[2, 4] other) => (float[2, N] y)'
MERGED = {"Concat": 1, "MatMul": 1, "Split": 1}


def graph(body: str, *weights: tuple[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A graph of x and other (2, 4), with random weights."""
    model = onnx.parser.parse_model(f"{HEADER} {{ {body} }}")
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}"
    random = np.random.default_rng(3)
    for name, shape in weights:
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        )
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto) -> Array:
    random = np.random.default_rng(5)
    inputs = {name: random.standard_normal((2, 4), np.float32) for name in ("x", "other")}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(["y"], inputs)[0]
    return result


def merged(model: onnx.ModelProto) -> dict[str, int]:
    """Which operators it has afterwards, but for the Concat that joins the results in these graphs; numbers agree."""
    changed = ir.from_proto(model)
    merge_products(Editor(changed))
    proto = ir.to_proto(changed)
    onnx.checker.check_model(proto, full_check=True)
    assert np.allclose(run(proto), run(model), atol=1e-6)
    operators = Counter(node.op_type for node in changed.graph)
    operators["Concat"] -= 1
    return {name: count for name, count in operators.items() if count}


@pytest.mark.parametrize(
    ("products", "shapes", "expected"),
    [
        ("a = MatMul(x, u) b = MatMul(x, v)", [(4, 3), (4, 3)], MERGED),
        (
            "m = MatMul(x, u) a = Add(m, p) n = MatMul(x, v) b = Add(q, n)",
            [(4, 3), (4, 3), (3,), (3,)],
            {"Concat": 2, "MatMul": 1, "Add": 1, "Split": 1},
        ),
        (
            "a = Gemm<transB = 1>(x, u, p) b = Gemm<transB = 1>(x, v, q)",
            [(3, 4), (3, 4), (3,), (3,)],
            {"Concat": 2, "Gemm": 1, "Split": 1},
        ),
        ("a = Gemm(x, u) b = Gemm(x, v)", [(4, 3), (4, 3)], {"Concat": 1, "Gemm": 1, "Split": 1}),
    ],
    ids=["MatMul", "MatMul and Add", "Gemm", "Gemm without bias"],
)
def test_products_of_one_input_are_merged(
    products: str, shapes: list[tuple[int, ...]], expected: dict[str, int]
) -> None:
    weights = zip("uvpq", shapes, strict=False)
    assert merged(graph(f"{products} y = Concat<axis = 1>(a, b)", *weights)) == expected


@pytest.mark.parametrize(
    ("products", "shapes"),
    [
        ("a = MatMul(x, u) b = MatMul(other, v)", [(4, 3), (4, 3)]),
        ("a = MatMul(x, u) b = MatMul(x, v)", [(4, 3), (4, 5)]),
        ("m = MatMul(x, u) a = Add(m, p) b = MatMul(x, v)", [(4, 3), (4, 3), (3,)]),
        ("m = MatMul(x, u) a = Add(m, p) n = MatMul(x, v) b = Add(n, q)", [(4, 3), (4, 3), (3,), (1,)]),
        ("a = Gemm<transB = 1>(x, u) b = Gemm(x, v)", [(4, 4), (4, 4)]),
        ("a = Gemm<alpha = 0.5>(x, u) b = Gemm<alpha = 0.5>(x, v)", [(4, 4), (4, 4)]),
        ("t = Transpose(other) a = MatMul(x, t) s = Transpose(other) b = MatMul(x, s)", []),
    ],
    ids=["inputs", "widths", "one bias", "a bias for all", "transposed", "scaled", "computed weights"],
)
def test_others_are_left_alone(products: str, shapes: list[tuple[int, ...]]) -> None:
    model = graph(f"{products} y = Concat<axis = 1>(a, b)", *zip("uvpq", shapes, strict=False))
    operators = Counter(node.op_type for node in model.graph.node)
    operators["Concat"] -= 1
    assert merged(model) == {name: count for name, count in operators.items() if count}


def test_a_result_that_is_read_twice_keeps_its_bias_apart() -> None:
    """The sum and the product itself are both wanted."""
    body = """m = MatMul(x, u) a = Add(m, p) n = MatMul(x, v) b = Add(n, q) y = Concat<axis = 1>(a, b, m, n)"""
    weights = [("u", (4, 3)), ("v", (4, 3)), ("p", (3,)), ("q", (3,))]
    assert merged(graph(body, *weights)) == {"Concat": 1, "MatMul": 1, "Split": 1, "Add": 2}


def test_no_split_has_more_parts_than_one_kernel_makes() -> None:
    names = [f"w{number}" for number in range(MOST_PARTS + 3)]
    body = " ".join(f"y_{name} = MatMul(x, {name})" for name in names)
    joined = ", ".join(f"y_{name}" for name in names)
    model = graph(f"{body} y = Concat<axis = 1>({joined})", *((name, (4, 2)) for name in names))
    assert merged(model) == {"Concat": 2, "MatMul": 2, "Split": 2}
