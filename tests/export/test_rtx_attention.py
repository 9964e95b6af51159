"""Attention blocks with the heads of the real networks, really built by TensorRT for RTX, for each kind of GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from attention_block import HEADS, PROMPT, TOKENS, write_block
from sd_export.tensorrt_.failures import NoKernelError
from sd_export.tensorrt_.launches import FUSED_ATTENTION
from sd_export.tensorrt_.portable import build_portable, float32_products
from sd_runtime.bundle.manifest import ShapeRange
from sd_runtime.errors import ExportError

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13", exc_type=ImportError)

CAPABILITIES = ("7.5", "8.0", "8.9", "12.0")
HEAD_SIZES = (40, 64, 80, 160)  # of Stable Diffusion 1.5: 40, 80, 160; of 2.1 and all text encoders: 64
SCRATCH = 8 << 20  # bytes of activations that every engine has


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head", HEAD_SIZES)
def test_attentions_to_tokens_and_prompt_are_fused(head: int, capability: str, tmp_path: Path) -> None:
    """One or two rows: what they launch besides products and attentions is a stated number, and scores are nowhere."""
    path, shapes = write_block(tmp_path, "trt-basic", head)
    built = build_portable("block", path, shapes, capability)
    account = built.account
    assert account.of(FUSED_ATTENTION) == built.attentions == 2
    assert float32_products(account, "fp16") == []
    assert len(account.launches) <= (18 if capability == "7.5" else 16)
    assert account.moves <= 9
    tokens = 2 * TOKENS * HEADS * head * 2  # bytes of two rows
    assert account.activations <= SCRATCH + 9 * tokens
    scores = (TOKENS, TOKENS)
    assert not [one for one in account.launches for tensor in one.outputs if tensor.shape[-2:] == scores]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_text_encoders_causal_attention_is_fused(capability: str, tmp_path: Path) -> None:
    path, shapes = write_block(tmp_path, "trt-basic", 64, causal=True)
    account = build_portable("block", path, shapes, capability).account
    assert account.of(FUSED_ATTENTION) == 1 and float32_products(account, "fp16") == []
    assert len(account.launches) <= 9


@pytest.mark.parametrize("form", ["trt-bf16", "trt-legacy"])
def test_the_other_forms_are_fused_as_well(form: str, tmp_path: Path) -> None:
    """`trt-legacy` takes the place of `trt-basic` where there is no kernel for that."""
    path, shapes = write_block(tmp_path, form, 40)
    built = build_portable("block", path, shapes)
    assert built.account.of(FUSED_ATTENTION) == built.attentions == 2
    assert float32_products(built.account, "fp16") == []


def test_rows_that_vary_launch_nothing_more(tmp_path: Path) -> None:
    path, shapes = write_block(tmp_path, "trt-basic", 80)
    exact = {name: replace(allowed, min=allowed.max) for name, allowed in shapes.items()}
    fixed, varying = (build_portable("block", path, wanted).account for wanted in (exact, shapes))
    assert len(fixed.launches) == len(varying.launches)
    assert varying.bytes < fixed.bytes  # which it cannot know


def test_bfloat16_is_nothing_for_turing(tmp_path: Path) -> None:
    path, shapes = write_block(tmp_path, "trt-bf16", 64)
    with pytest.raises(ExportError, match=r"lack a type of numbers that the graph has .*leave out --turing"):
        build_portable("block", path, shapes, "7.5")


def test_an_attention_operator_that_may_not_be_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 there is no kernel for it: for a form without such operators there is one."""
    path, shapes = write_block(tmp_path, "plain", 64)
    with pytest.raises(NoKernelError, match="no fused kernel for an attention that it may not take apart"):
        build_portable("block", path, shapes)


def test_an_unfused_attention_of_any_length_is_built(tmp_path: Path) -> None:
    """In float32, up to 1024 tokens: its scores need more scratch space than any limit that was set by us."""
    path, shapes = write_block(tmp_path, "trt-f32", 64)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        if value.name != "prompt":
            value.type.tensor_type.shape.dim[1].dim_param = "length"
    del model.graph.value_info[:]
    onnx.save(model, path)
    allowed = shapes["tokens"]
    ends = [(rows, length, allowed.max[2]) for rows, length in ((1, 64), (2, 256), (2, 1024))]
    account = build_portable("block", path, shapes | {"tokens": ShapeRange(*ends)}).account
    assert account.of(FUSED_ATTENTION) == 0
    assert account.activations >= 2 * HEADS * 1024 * (1024 + PROMPT) * 4  # bytes of its scores
