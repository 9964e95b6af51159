"""Launches counted from the log of a real build, by TensorRT for RTX where it is installed, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DConditionModel
from sd_export.graphs.forms import FORMS, rewrite
from sd_export.graphs.precision import to_float16
from sd_export.graphs.weights import save, save_graph
from sd_export.networks.unet import UNet, unet_signature
from sd_export.signature import Sizes
from sd_export.tensorrt_.launches import CLEAR, FUSED_ATTENTION, Account, Launch, Tensor, read_account
from sd_export.tensorrt_.portable import build_portable
from sd_runtime.bundle.manifest import ShapeRange
from sd_runtime.errors import ExportError

LISTING = """Layers:
Name: __myl_Move_myl0_6, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ { Name: a, Dimensions: [128], Strides: [1], StrideOrder: [0], Datatype: Int32, Format: (Linear) Row major linear format }], TacticName: t, StreamId: 0, Metadata: 
Name: _gemm_mha_v2_myl0_18, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [16,64,40], Strides: [40,640,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Linear) Row major linear format }, { Name: k, Dimensions: [-1,40,64], Strides: [40,1,-1], StrideOrder: [1,0,2], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: r, Dimensions: [16,64,40], Strides: [40,640,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Linear) Row major linear format }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: x]
Name: __mye77_myl0_19, LayerType: reshape, Inputs: [], Constants: [], Outputs: [ { Name: s, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Int64, Format: (Linear) Row major linear format }], TacticName: , StreamId: 0, Metadata: 
Name: conv_in/Conv_U5_myl0_5, LayerType: correlation, Inputs: [], Constants: [ { Name: w, Dimensions: [8] }], Outputs: [ { Name: c, Dimensions: [2,320,8,8], Strides: [20480,1,2560,320], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: y]
Bindings: sample"""  # noqa: E501, W291  # as TensorRT for RTX 1.7 writes it
MEMORY = ("Total Activation Memory: 84194816 bytes", "Total Weights Memory: 1719042944 bytes")

# Launches of the demo's networks in float16 at its own size, two rows in the UNet
MOST: Mapping[str, int] = {"unet": 300, "vae_decoder": 96, "vae_encoder": 63, "text_encoder": 21}


def test_the_log_is_read() -> None:
    """Shapes that the host computes are no launches, and an axis that varies leaves its tensor's bytes out."""
    got = read_account(["something else", LISTING, *MEMORY])
    clear, attention, convolution = got.launches
    assert clear == Launch("__myl_Move_myl0_6", CLEAR, (), (Tensor((128,), "Int32"),))
    assert (attention.kind, attention.bytes) == (FUSED_ATTENTION, 2 * 16 * 64 * 40 * 2)
    assert (convolution.kind, convolution.outputs) == ("correlation", (Tensor((2, 320, 8, 8), "Float"),))
    assert got.bytes == 128 * 4 + attention.bytes + 2 * 320 * 8 * 8 * 4
    assert (got.activations, got.weights, got.of(CLEAR)) == (84194816, 1719042944, 1)


@pytest.mark.parametrize("log", [[], [LISTING], [LISTING, MEMORY[0]], MEMORY])
def test_a_log_that_says_less_is_refused(log: list[str]) -> None:
    with pytest.raises(ExportError, match="lists no layers"):
        read_account(log)


def count(path: Path, form: str, sizes: Mapping[str, tuple[int, int]]) -> Account:
    """The account of the graph in `path`, rewritten; `sizes` are the smallest and largest of each axis that varies."""
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13", exc_type=ImportError)
    model = ir.load(path)
    rewrite(model, FORMS[form])
    target = path.with_name(f"{form}.onnx")
    target.unlink(missing_ok=True)
    save_graph(model, target)
    profile = {}
    for value in onnx.load(target, load_external_data=False).graph.input:
        axes = [
            (d.dim_value, d.dim_value) if d.dim_value else sizes[d.dim_param] for d in value.type.tensor_type.shape.dim
        ]
        low, high = (tuple(axis[end] for axis in axes) for end in (0, 1))
        profile[value.name] = ShapeRange(low, high, high)
    return build_portable(path.parent.name, target, profile).account


def latents(rows: tuple[int, int], side: int) -> dict[str, tuple[int, int]]:
    sides = dict.fromkeys(("latent_height", "latent_width"), (side, side))
    pixels = dict.fromkeys(("height", "width"), (8 * side, 8 * side))
    return {"batch": rows, "timesteps": rows, "sequence_length": (77, 77), **sides, **pixels}


@pytest.mark.parametrize("name", MOST)
def test_the_demo_launches_no_more_than_it_did(name: str, demo_bundle: Path, tmp_path: Path) -> None:
    model = ir.load(demo_bundle / name / "model.onnx")
    to_float16(model)
    save(model, tmp_path / "model.onnx", tmp_path / "model.safetensors")
    rows = 2 if name == "unet" else 1
    got = count(tmp_path / "model.onnx", "trt-basic", latents((rows, rows), 16))
    launches = len(got.launches)
    assert launches <= MOST[name]
    convolved = {tensor.dtype for launch in got.launches if launch.kind == "correlation" for tensor in launch.inputs}
    assert convolved == (set() if name == "text_encoder" else {"Half"})
    assert got.of(FUSED_ATTENTION) == {"unet": 20, "text_encoder": 2}.get(name, 0)  # the autoencoder's is too wide


@pytest.fixture
def unet(trace_module: Callable[..., Any]) -> Mapping[str, Any]:
    """Two levels with heads 40 and 80 wide, as Stable Diffusion 1's."""
    torch.manual_seed(0)
    module = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(80, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    traced: Mapping[str, Any] = trace_module(UNet(module), unet_signature(Sizes(4, 8, 16, 77, 64)), "unet")
    return traced


@pytest.mark.parametrize(("form", "precision"), [("trt-basic", "fp16"), ("trt-bf16", "fp32")])
def test_attention_is_fused_and_rows_that_vary_launch_nothing_more(
    unet: Mapping[str, Any], form: str, precision: str
) -> None:
    """Heads as wide as real ones: 14 attentions in 7 blocks."""
    exact, varying = (count(unet[precision].graph, form, latents((low, 2), 32)) for low in (2, 1))
    assert exact.of(FUSED_ATTENTION) == varying.of(FUSED_ATTENTION) == 14
    launches = [len(engine.launches) for engine in (exact, varying)]
    assert launches[0] == launches[1] <= 243
    assert varying.bytes < exact.bytes  # which it cannot know
