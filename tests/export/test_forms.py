"""Every form of every network computes what the plain form computes, over the same weights file.

Measured on the demo model, largest difference by the largest value of the output (`pytest -s` prints them)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented
from runnable import in_float32, with_functions
from sd_export.graphs.forms import FORMS, rewrite, write_forms
from sd_export.graphs.forms.attention import decompose_attention
from sd_export.graphs.forms.editor import Editor
from sd_export.graphs.forms.products import stack_products
from sd_export.graphs.forms.tokens import MERGE_HEADS, SPLIT_HEADS, TOKENS_FIRST, project_tokens
from sd_export.graphs.names import FLOAT32
from sd_export.graphs.precision import to_float16
from sd_export.graphs.weights import save
from sd_export.networks.unet import UNet, unet_signature
from sd_export.signature import Sizes
from sd_runtime.bundle.manifest import MANIFEST, Graph, Manifest, Precision
from sd_runtime.errors import ExportError
from sd_runtime.tensor import Array
from tiny_checkpoints import STABLE_DIFFUSION_2, WIDTH, tiny_unet

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
LIMITS: dict[Precision, float] = {"fp32": 1e-5, "fp16": 1e-2}
BFLOAT16_LIMIT = 5e-2
RUNNABLE = {"cuda": with_functions, "trt-bf16": in_float32}
Forms = dict[str, dict[str, Graph]]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


@pytest.fixture(scope="module")
def bundle(precision: Precision, demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Forms]:
    """A folder with the demo model's networks in one precision and all forms, and the forms by component."""
    folder = tmp_path_factory.mktemp(precision)
    manifest = Manifest.from_bytes((demo_bundle / MANIFEST).read_bytes())
    forms = {}
    for name in COMPONENTS:
        (folder / name).mkdir()
        model = ir.load(demo_bundle / name / "model.onnx")
        if precision == "fp16":
            to_float16(model)
        save(model, folder / name / "model.onnx", folder / name / "model.safetensors")
        plain = manifest.components[name].graph()
        forms[name] = {"plain": plain, **write_forms(folder, plain, precision)}
    return folder, forms


def feeds(graph: Graph, height: int = 10, width: int = 13) -> dict[str, Array]:
    """Random inputs at sizes that the graph was not traced at."""
    random = np.random.default_rng(7)
    sizes = {
        "batch": 2,
        "timesteps": 2,
        "latent_height": height,
        "latent_width": width,
        "height": 8 * height,
        "width": 8 * width,
    }
    values: dict[str, Array] = {}
    for spec in graph.inputs:
        shape = [axis if isinstance(axis, int) else sizes.get(axis.symbol, axis.min) for axis in spec.shape]
        if spec.dtype.startswith("int"):
            values[spec.name] = random.integers(0, 600, shape).astype(spec.dtype)
        else:
            values[spec.name] = random.standard_normal(shape, np.float32)
    if "timestep" in values:
        values["timestep"][:] = 501.5
    return values


def run(model: bytes, folder: Path, inputs: Mapping[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session: Any = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    output: Array = session.run([session.get_outputs()[0].name], dict(inputs))[0]
    return output


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_computes_what_the_plain_form_computes(
    form: str, component: str, precision: Precision, bundle: tuple[Path, Forms]
) -> None:
    folder, forms = bundle
    if form not in forms[component]:
        pytest.skip(f"{form} is not for {precision}")
    graph = forms[component][form]
    path = folder / graph.path
    content = path.read_bytes()
    got = run(RUNNABLE[form](content) if form in RUNNABLE else content, path.parent, feeds(graph))
    plain = forms[component]["plain"]
    expected = run((folder / plain.path).read_bytes(), path.parent, feeds(plain))
    assert got.dtype == expected.dtype == np.float32
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    print(f"{precision} {component} {form}: {error:.1e}")
    assert error < (BFLOAT16_LIMIT if form == "trt-bf16" else LIMITS[precision])


def test_forms_share_one_weights_file(bundle: tuple[Path, Forms]) -> None:
    """Their own files are small, and every large tensor is the one that the plain form reads."""
    folder, forms = bundle
    for component, graphs in forms.items():
        plain = _external(folder / graphs["plain"].path)
        for graph in graphs.values():
            path = folder / graph.path
            onnx.checker.check_model(str(path), full_check=True)
            assert path.stat().st_size < 1 << 20
            assert _external(path).items() <= plain.items()
        assert sorted(p.name for p in (folder / component).glob("*.safetensors")) == ["model.safetensors"]


def test_legacy_graphs_use_nothing_newer_than_opset_17(bundle: tuple[Path, Forms]) -> None:
    """Nor what TensorRT 8.5's parser does not know, or knows wrongly."""
    folder, forms = bundle
    unknown = {"Attention", "Gelu", "GroupNormalization", "LayerNormalization", "InstanceNormalization"}
    for graphs in forms.values():
        model = onnx.load(folder / graphs["trt-legacy"].path, load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
        assert not unknown & {node.op_type for node in model.graph.node}
        assert all(not node.attribute for node in model.graph.node if node.op_type == "Shape")


def test_bfloat16_graphs_resize_in_float32(bundle: tuple[Path, Forms]) -> None:
    """And nothing more than the resizing: the convolution after it is bfloat16 again."""
    folder, forms = bundle
    if "trt-bf16" not in forms["unet"]:
        pytest.skip("bfloat16 is made from float32")
    for component in ("unet", "vae_decoder"):
        model = ir.load(folder / forms[component]["trt-bf16"].path)
        resizes = [node for node in model.graph if node.op_type == "Resize"]
        assert resizes
        for node in resizes:
            assert node.inputs[0] is not None and (cast := node.inputs[0].producer()) is not None
            assert cast.op_type == "Cast" and cast.attributes["to"].value == ir.DataType.FLOAT.value
            users = [user for user, _ in node.outputs[0].uses()]
            assert [(user.op_type, user.attributes["to"].value) for user in users] == [
                ("Cast", ir.DataType.BFLOAT16.value)
            ]


def test_each_form_has_what_its_runtime_fuses(bundle: tuple[Path, Forms]) -> None:
    folder, forms = bundle
    plain, cuda, basic = (_operators(folder / forms["unet"][form].path) for form in ("plain", "cuda", "trt-basic"))
    assert cuda["MultiHeadAttention"] == plain["Attention"]
    assert cuda["GroupNorm"] + cuda["SkipGroupNorm"] == plain["GroupNormalization"]
    assert cuda["NhwcConv"] == plain["Conv"] and "Conv" not in cuda
    assert cuda["SkipGroupNorm"] > cuda["GroupNorm"] and "Sigmoid" in cuda  # the timestep's own are left
    assert cuda["SkipLayerNormalization"] == 2 * cuda["LayerNormalization"] < 2 * cuda["BiasAdd"]
    assert basic["Softmax"] == plain["Attention"] and "Attention" not in basic
    blocks = plain["Attention"] // 2
    assert basic["Conv"] == plain["Conv"] - 2 * blocks
    small = basic["ReduceMean"] // 2
    assert basic["InstanceNormalization"] + small == plain["GroupNormalization"] > small > 0


def test_biases_of_convolutions_are_added_with_what_else_is_added(bundle: tuple[Path, Forms]) -> None:
    """SkipGroupNorm and BiasAdd add them in passing; cuDNN's own addition reads and writes the whole tensor again."""
    folder, forms = bundle
    for name in ("unet", "vae_decoder", "vae_encoder"):
        model = ir.load(folder / forms[name]["cuda"].path)
        assert not [n for n in model.graph if n.op_type == "Add" and len(n.outputs[0].shape or ()) == 4]
        added = {"with their own": 0, "by the next": 0}
        for node in model.graph:
            users = [user.op_type for user in _readers(node.outputs[0])] if node.op_type == "NhwcConv" else []
            if len(users) == 1 and users[0] in ("SkipGroupNorm", "BiasAdd"):
                added["with their own" if len(node.inputs) == 3 else "by the next"] += 1
        assert added["with their own"] == 0 < added["by the next"]


def _readers(value: ir.Value) -> list[ir.Node]:
    """What computes with `value`, seen through changes of its layout."""
    found = []
    for node, _ in value.uses():
        found += _readers(node.outputs[0]) if node.op_type in ("Transpose", "Reshape") else [node]
    return [node for node in found if node.op_type != "Shape"]


def test_products_of_one_input_are_one(bundle: tuple[Path, Forms]) -> None:
    """Q, K and V of each attention over itself; K and V of the prompt in all blocks, for each of their widths; and the
    timestep's projections likewise."""
    folder, forms = bundle
    for name in COMPONENTS:
        before, after = (ir.load(folder / forms[name][form].path).graph for form in ("plain", "cuda"))
        kinds = [_kind(node) for node in before if node.op_type in ("MatMul", "Gemm")]
        assert sorted(_kind(node)[:2] for node in after if node.op_type in ("MatMul", "Gemm")) == sorted(
            kind[:2] for kind in {*kinds}
        )
        assert len({*kinds}) < len(kinds)


def _kind(product: ir.Node) -> tuple[str, str, str]:
    """Operator, input and width of a matrix product."""
    source, weight, *_ = product.inputs
    assert source is not None and weight is not None
    return product.op_type, str(source.name), str(weight.shape)


def test_the_cuda_form_is_typed_as_its_operators_are(bundle: tuple[Path, Forms]) -> None:
    """ONNX Runtime checks a graph against the operators' schemas before it looks for kernels, which only a GPU has."""
    folder, forms = bundle
    for name in ("unet", "vae_decoder", "vae_encoder"):
        with pytest.raises(NotImplemented, match=r"GroupNorm|NhwcConv"):
            ort.InferenceSession(folder / forms[name]["cuda"].path, providers=["CPUExecutionProvider"])


def test_tokens_are_transposed_at_the_edges_of_transformer_blocks_only(bundle: tuple[Path, Forms]) -> None:
    """Once into each block, once out of it, and the prompt once for all of them."""
    folder, forms = bundle
    for form in ("trt-basic", "trt-bf16"):
        if form in forms["unet"]:
            graph = ir.load(folder / forms["unet"][form].path).graph
            orders = [tuple(node.attributes["perm"].as_ints()) for node in graph if node.op_type == "Transpose"]
            attentions = sum(node.op_type == "Softmax" for node in graph)
            assert orders.count(TOKENS_FIRST) == 2 * (attentions // 2) + 1
            assert orders.count(SPLIT_HEADS) == 2 * attentions  # of Q and V; of K the two last axes are exchanged
            assert orders.count(MERGE_HEADS) == attentions and (0, 2, 1, 3) not in orders
    basic, legacy = (ir.load(folder / forms["text_encoder"][form].path).graph for form in ("trt-basic", "trt-legacy"))
    assert TOKENS_FIRST not in [
        tuple(n.attributes["perm"].as_ints()) for n in (*basic, *legacy) if n.op_type == "Transpose"
    ]


@pytest.mark.parametrize("form", [name for name in FORMS if name.startswith("trt")])
def test_transformers_of_stable_diffusion_2(trace_module: Callable[..., Any], form: str) -> None:
    """Linear projections, which are products of the tokens as they are, and a width for each level's heads."""
    torch.manual_seed(0)
    unet = tiny_unet(**STABLE_DIFFUSION_2)
    traced = trace_module(UNet(unet), unet_signature(Sizes(4, 8, 8, 77, WIDTH)), "unet")["fp32"]
    feeds = traced.feeds({"batch": 2, "latent_height": 10, "latent_width": 13, "sequence_length": 154})
    expected = run(traced.graph.read_bytes(), traced.graph.parent, feeds)
    model = ir.load(traced.graph)
    rewrite(model, FORMS[form])
    content = ir.to_proto(model).SerializeToString()
    got = run(RUNNABLE[form](content) if form in RUNNABLE else content, traced.graph.parent, feeds)
    limit = BFLOAT16_LIMIT if form == "trt-bf16" else LIMITS["fp32"]
    assert np.abs(got - expected).max() < limit * np.abs(expected).max()


def test_softmax_is_float32_for_tensorrt(bundle: tuple[Path, Forms]) -> None:
    """Where nothing fuses it, scores keep their precision between the products as they do where something does."""
    folder, forms = bundle
    for component in COMPONENTS:
        for form in ("trt-basic", "trt-bf16"):
            if form in forms[component]:
                graph = ir.load(folder / forms[component][form].path).graph
                found = [node.outputs[0].dtype for node in graph if node.op_type == "Softmax"]
                assert found and {*found} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("attributes", ["", "strides = [2, 2]", "pads = [1, 1, 1, 1]"])
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("channels", [8, 12])
def test_projections_are_products_where_they_may_be(tmp_path: Path, side: str, attributes: str, channels: int) -> None:
    """A convolution that moves, or that changes the number of channels, stays one."""
    conv = f"Conv<{attributes}>" if attributes else "Conv"
    body = {
        "before": f"""main (float[2, 8, 6, 5] x, float[{channels}, 8, 1, 1] weight) => (y) {{
            planes = {conv}(x, weight, bias)
            last = Transpose<perm = [0, 2, 3, 1]>(planes)
            y = Reshape(last, shape)""",
        "after": f"""main (float[2, 30, 8] x, float[{channels}, 8, 1, 1] weight) => (y) {{
            last = Reshape(x, shape)
            first = Transpose<perm = [0, 3, 1, 2]>(last)
            y = {conv}(first, weight, bias)""",
    }[side]
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 23]> {body} }}""")
    random = np.random.default_rng(3)
    shape = np.array([0, -1, channels] if side == "before" else [0, 6, 5, 8])
    constants = {"shape": shape, "bias": random.standard_normal(channels, np.float32)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    inputs = {"weight": random.standard_normal((channels, 8, 1, 1), np.float32)}
    inputs["x"] = random.standard_normal((2, 8, 6, 5) if side == "before" else (2, 30, 8), np.float32)
    expected = run(proto.SerializeToString(), tmp_path, inputs)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    project_tokens(Editor(model))
    model.graph.sort()
    stays = bool(attributes) or channels != 8
    assert stays == any(node.op_type == "Conv" for node in model.graph)
    assert np.allclose(run(ir.to_proto(model).SerializeToString(), tmp_path, inputs), expected, atol=1e-5)


def test_a_prompts_products_are_stacked_ten_at_a_time(tmp_path: Path) -> None:
    """What the network computes itself is left alone: TensorRT batches the products of a self-attention as it is."""
    products = [f"p{number} = MatMul(prompt, w{number})" for number in range(12)]
    products += [f"q{number} = MatMul(hidden, w{number})" for number in range(2)]
    names = [line.split()[0] for line in products]
    weights = ", ".join(f"float[4, 6] w{number}" for number in range(12))
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    main (float[3, 2, 4] x, {weights}) => (float[3, 2, {6 * len(names)}] y) {{
        prompt = Transpose<perm = [0, 1, 2]>(x)
        hidden = Mul(x, x)
        {" ".join(products)}
        y = Concat<axis = 2>({", ".join(names)})
    }}"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    random = np.random.default_rng(4)
    inputs = {"x": random.standard_normal((3, 2, 4), np.float32)}
    inputs |= {f"w{number}": random.standard_normal((4, 6), np.float32) for number in range(12)}
    expected = run(ir.to_proto(model).SerializeToString(), tmp_path, inputs)
    for node in model.graph:
        node.name = node.outputs[0].name
    stack_products(Editor(model))
    model.graph.sort()
    parts = [len(node.outputs) for node in model.graph if node.op_type == "Split"]
    assert parts == [10, 2] and sum(node.op_type == "MatMul" for node in model.graph) == 4
    assert np.allclose(run(ir.to_proto(model).SerializeToString(), tmp_path, inputs), expected, atol=1e-5)


@pytest.mark.parametrize("more", ["is_causal = 1", "softcap = 30.0"])
def test_attention_that_does_more_is_refused(more: str) -> None:
    """Rather than computed without."""
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    main (float[2, 5, 1, 64] x) => (float[2, 1, 5, 64] y) {{
        heads = Transpose<perm = [0, 2, 1, 3]>(x)
        y = Attention<{more}>(heads, heads, heads)
    }}"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    with pytest.raises(ExportError, match=f"{more.split()[0]}: got"):
        decompose_attention(Editor(model))


def test_bias_split_gelu_is_used_for_the_widths_it_has(tmp_path: Path) -> None:
    """The demo model is too narrow for it; Stable Diffusion's three widths are exactly those of the kernel."""
    for half, operators in ((1280, {"MatMul", "BiasSplitGelu"}), (96, {"MatMul", "Add", "Split", "Gelu", "Mul"})):
        text = f"""<ir_version: 10, opset_import: ["" : 23]>
        main (float[2, 3, 8] x, float[8, {2 * half}] weight) => (float[2, 3, {half}] y)
        {{
            product = MatMul(x, weight)
            biased = Add(product, bias)
            left, right = Split<axis = 2, num_outputs = 2>(biased)
            gelu = Gelu(right)
            y = Mul(left, gelu)
        }}"""
        proto = onnx.parser.parse_model(text)
        random = np.random.default_rng(2)
        bias = onnx.numpy_helper.from_array(random.standard_normal(2 * half, np.float32), "bias")
        proto.graph.initializer.append(bias)
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        inputs = {
            name: random.standard_normal(shape, np.float32)
            for name, shape in (("x", (2, 3, 8)), ("weight", (8, 2 * half)))
        }
        expected = run(proto.SerializeToString(), tmp_path, inputs)
        rewrite(model, FORMS["cuda"])
        assert {node.op_type for node in model.graph} == operators
        fused = with_functions(ir.to_proto(model).SerializeToString())
        assert np.allclose(run(fused, tmp_path, inputs), expected, atol=1e-5)


def _external(path: Path) -> dict[str, tuple[str, ...]]:
    """Where a graph's outside tensors lie: name → (file, offset, length)."""
    model = onnx.load(path, load_external_data=False)
    return {t.name: tuple(e.value for e in t.external_data) for t in model.graph.initializer if t.external_data}


def _nodes(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path, load_external_data=False).graph.node)


def _operators(path: Path) -> dict[str, int]:
    names = [node.op_type for node in _nodes(path)]
    return {name: names.count(name) for name in names}


def test_legacy_names_say_what_stays_float32(bundle: tuple[Path, Forms], precision: Precision) -> None:
    """TensorRT 8 takes the precision of a layer from the builder, which goes by these names."""
    folder, forms = bundle
    model = onnx.load(folder / forms["unet"]["trt-legacy"].path, load_external_data=False)
    marked = {node.op_type for node in model.graph.node if FLOAT32 in node.name}
    unmarked = {node.op_type for node in model.graph.node if FLOAT32 not in node.name}
    if precision == "fp32":
        assert not marked
    else:
        assert {"Sin", "Cos", "ReduceMean", "Sqrt"} <= marked - unmarked
        assert {"Conv", "Gemm", "MatMul", "Softmax"} <= unmarked - marked
