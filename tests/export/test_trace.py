"""Traced graphs against the torch modules that they came from, at shapes other than the traced one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from sd_export.graphs.trace import OPSET, trace
from sd_export.networks.text_encoder import TextEncoder, text_encoder_signature
from sd_export.networks.unet import UNet, unet_signature
from sd_export.signature import Signature, Sizes, trace_shape
from sd_runtime.errors import ExportError
from sd_runtime.tensor import Array, Dim, TensorSpec
from transformers import CLIPTextConfig, CLIPTextModel

# Latent sizes, none of which is the traced one: odd, even, the smallest, and larger than traced.
SHAPES = [
    {"batch": 1, "latent_height": 8, "latent_width": 8, "sequence_length": 77},
    {"batch": 3, "latent_height": 21, "latent_width": 12, "sequence_length": 231},
    {"batch": 2, "latent_height": 32, "latent_width": 40, "sequence_length": 154},
]


def relative_error(got: Array, expected: Array) -> float:
    """‖got − expected‖ / ‖expected‖ in float64."""
    difference = np.asarray(got, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected, np.float64)))


def with_pixels(sizes: dict[str, int]) -> dict[str, int]:
    return sizes | {"height": 8 * sizes["latent_height"], "width": 8 * sizes["latent_width"]}


def limit(component: str, precision: str, sizes: dict[str, int]) -> float:
    """Accepted relative error.  The decoder's grows with the picture, in float32 as in float16: its attention and its
    norms sum over all cells, and each framework sums in an order of its own."""
    if precision == "fp16":
        return 3e-3
    cells = sizes["latent_height"] * sizes["latent_width"]
    return 1e-5 * max(1.0, (cells / 64) ** 0.5) if component == "vae_decoder" else 1e-5


@pytest.mark.parametrize("sizes", SHAPES, ids=lambda s: f"{s['batch']}x{s['latent_height']}x{s['latent_width']}")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity_with_torch(traced: Callable[..., Any], component: str, precision: str, sizes: dict[str, int]) -> None:
    network = traced(component, precision)
    feeds = network.feeds(with_pixels(sizes))
    expected, got = network.reference(feeds), network.run(feeds)
    for name, reference in expected.items():
        assert got[name].shape == reference.shape
        assert got[name].dtype == np.float32
        assert relative_error(got[name], reference) < limit(component, precision, sizes), name


def test_unet_takes_fractional_timesteps(traced: Callable[..., Any]) -> None:
    network = traced("unet", "fp32")
    feeds = network.feeds(with_pixels(SHAPES[0]))
    outputs = {}
    for timestep in (0.0, 0.5, 998.999):
        feeds["timestep"] = np.array([timestep], np.float32)
        outputs[timestep] = network.run(feeds)["out_sample"]
        assert relative_error(outputs[timestep], network.reference(feeds)["out_sample"]) < 1e-5
    assert not np.allclose(outputs[0.0], outputs[0.5])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_row_of_the_unet_has_a_timestep_of_its_own(traced: Callable[..., Any], precision: str) -> None:
    """Rows at different steps share a call, and each is what it is alone; one timestep serves all rows, too."""
    network = traced("unet", precision)
    feeds = network.feeds(with_pixels({**SHAPES[0], "batch": 3, "timesteps": 3}))
    feeds["timestep"] = np.array([981.0, 500.25, 1.0], np.float32)
    together = network.run(feeds)["out_sample"]
    for row in range(3):
        alone = network.run({name: values[row : row + 1] for name, values in feeds.items()})["out_sample"]
        assert relative_error(together[row : row + 1], alone) < (1e-5 if precision == "fp32" else 2e-3)
    same = network.run(feeds | {"timestep": np.full(3, 7.5, np.float32)})["out_sample"]
    assert np.array_equal(same, network.run(feeds | {"timestep": np.full(1, 7.5, np.float32)})["out_sample"])


def assert_parity(network: Any, sizes: dict[str, int], limit: float) -> None:
    feeds = network.feeds(with_pixels(sizes))
    expected, got = network.reference(feeds), network.run(feeds)
    for name, reference in expected.items():
        assert relative_error(got[name], reference) < limit, name


def test_unet_of_stable_diffusion_2(trace_module: Callable[..., Any]) -> None:
    """Linear projections, a number of heads for each level, attention that the checkpoint wants in float32."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        upcast_attention=True,
    )
    graphs = trace_module(UNet(unet), unet_signature(Sizes(4, 8, 16, 77, 24)), "unet")
    assert_parity(graphs["fp32"], SHAPES[1], 1e-5)
    assert_parity(graphs["fp16"], SHAPES[1], 3e-3)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_encoders_as_published(trace_module: Callable[..., Any], activation: str) -> None:
    """Both versions' configs name 2 as the end of text: transformers then takes the largest id's position."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=602,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
    )
    graphs = trace_module(TextEncoder(CLIPTextModel(config)), text_encoder_signature(Sizes(4, 8, 16, 77, 24)))
    assert_parity(graphs["fp32"], SHAPES[1], 1e-5)
    assert_parity(graphs["fp16"], SHAPES[1], 3e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_pass_the_checker(traced: Callable[..., Any], component: str, precision: str) -> None:
    onnx.checker.check_model(str(traced(component, precision).graph), full_check=True)


def test_edge_follows_the_signature(traced: Callable[..., Any], component: str) -> None:
    network = traced(component, "fp16")
    model = onnx.load(network.graph, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    for values, specs in (
        (model.graph.input, network.signature.inputs),
        (model.graph.output, network.signature.outputs),
    ):
        for value, spec in zip(values, specs, strict=True):
            axes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert value.name == spec.name
            assert axes == [axis.symbol if isinstance(axis, Dim) else axis for axis in spec.shape]


def test_names_are_optimum_s(traced: Callable[..., Any], component: str) -> None:
    signature = traced(component, "fp32").signature
    assert ([spec.name for spec in signature.inputs], [spec.name for spec in signature.outputs]) == {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }[component]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_of_this_machine_is_in_the_graph(traced: Callable[..., Any], component: str, precision: str) -> None:
    content = traced(component, precision).graph.read_bytes()
    for trace_of_us in (b"site-packages", str(Path.home()).encode() + b"/", b".py", b"/tmp/", b"stack_trace"):
        assert trace_of_us not in content
    model = onnx.load_from_string(content)
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        assert not item.doc_string
        assert not item.metadata_props


def test_nodes_are_named_after_modules(traced: Callable[..., Any], component: str) -> None:
    network = traced(component, "fp32")
    nodes = onnx.load(network.graph, load_external_data=False).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    paths = {re.sub(r"^unet\.?", "", path) for path, _ in network.module.named_modules()}
    assert {name.rpartition("/")[0] for name in names} <= paths
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    assert all(node.input[1] == node.name.replace("/Conv", ".weight") for node in convolutions)


def frozen_signature() -> Signature:
    shape = (Dim("batch", 1, 2, 4), 4)
    return Signature((TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", shape),))


def test_a_frozen_axis_is_found() -> None:
    class Frozen(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2)  # on the batch: fixes it to the traced size
            return torch.cat([first, second]) + torch.ones(x.shape[0], 1).reshape(2, 1)

    with pytest.raises(ExportError, match=r"got .*accepted|cannot trace"):
        trace(Frozen().eval(), frozen_signature(), pixels=8)


def test_an_untraceable_module_is_one_line() -> None:
    class Impossible(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"cannot trace Impossible .*SD_DEBUG=1") as caught:
        trace(Impossible().eval(), frozen_signature(), pixels=8)
    assert "\n" not in str(caught.value)


def test_trace_shapes_are_odd_and_differ() -> None:
    spec = TensorSpec(
        "x", "float32", (Dim("batch", 1, 1, 16), 4, Dim("latent_height", 8, 64, 128), Dim("latent_width", 8, 64, 128))
    )
    batch, channels, height, width = trace_shape(spec, 8)
    assert (batch, channels) == (2, 4)
    assert height % 2 == width % 2 == 1
    assert height != width
