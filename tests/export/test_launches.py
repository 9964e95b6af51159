"""Launches counted from what a build by TensorRT for RTX logs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sd_export.tensorrt_.launches import CLEAR, FUSED_ATTENTION, Launch, Tensor, read_account
from sd_runtime.errors import ExportError

LISTING = """Layers:
Name: __myl_Move_myl0_6, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ { Name: a, Dimensions: [128], Strides: [1], StrideOrder: [0], Datatype: Int32, Format: (Linear) Row major linear format }], TacticName: t, StreamId: 0, Metadata: 
Name: _gemm_mha_v2_myl0_18, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [16,64,40], Strides: [40,640,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Linear) Row major linear format }, { Name: k, Dimensions: [-1,40,64], Strides: [40,1,-1], StrideOrder: [1,0,2], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: r, Dimensions: [16,64,40], Strides: [40,640,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Linear) Row major linear format }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: x]
Name: __mye77_myl0_19, LayerType: reshape, Inputs: [], Constants: [], Outputs: [ { Name: s, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Int64, Format: (Linear) Row major linear format }], TacticName: , StreamId: 0, Metadata: 
Name: conv_in/Conv_U5_myl0_5, LayerType: correlation, Inputs: [], Constants: [ { Name: w, Dimensions: [8] }], Outputs: [ { Name: c, Dimensions: [2,320,8,8], Strides: [20480,1,2560,320], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: y]
Bindings: sample"""  # noqa: E501, W291  # as TensorRT for RTX 1.7 writes it
MEMORY = ("Total Activation Memory: 84194816 bytes", "Total Weights Memory: 1719042944 bytes")


def test_the_log_is_read() -> None:
    """Shapes that the host computes are no launches, and an axis that varies leaves its tensor's bytes out."""
    got = read_account(["something else", LISTING, *MEMORY])
    clear, attention, convolution = got.launches
    assert clear == Launch("__myl_Move_myl0_6", CLEAR, (), (Tensor((128,), "Int32"),))
    assert (attention.kind, attention.bytes) == (FUSED_ATTENTION, 2 * 16 * 64 * 40 * 2)
    assert (convolution.kind, convolution.outputs) == ("correlation", (Tensor((2, 320, 8, 8), "Float"),))
    assert got.bytes == 128 * 4 + attention.bytes + 2 * 320 * 8 * 8 * 4
    assert got.moves == 0 and replace(got, launches=(replace(clear, kind="SlicReshTran"), *got.launches)).moves == 1
    assert (got.activations, got.weights, got.of(CLEAR)) == (84194816, 1719042944, 1)


@pytest.mark.parametrize("log", [[], [LISTING], [LISTING, MEMORY[0]], MEMORY])
def test_a_log_that_says_less_is_refused(log: list[str]) -> None:
    with pytest.raises(ExportError, match="lists no layers"):
        read_account(log)
