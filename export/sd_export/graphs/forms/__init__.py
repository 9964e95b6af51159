"""The further graphs of a network: the same arithmetic over the same weights file, in the words of another runtime.

    plain        opset 23 as traced: Attention, GroupNormalization, Gelu …         ONNX Runtime, OpenVINO
    cpu          MultiHeadAttention, InstanceNormalization                         ONNX Runtime's CPU provider
    cuda         fused operators of ONNX Runtime, channels last                    ONNX Runtime's CUDA provider
    trt-basic    opset 20: attention taken apart, InstanceNormalization for groups TensorRT 10 and later, and for RTX
    trt-bf16     the same in bfloat16, over float32 weights, GroupNormalization    TensorRT 10.15 and later, and for RTX
    trt-legacy   opset 17: nor LayerNormalization nor Gelu                         TensorRT 8.5 and 8.6

TensorRT fuses attention that is taken apart, its softmax in float32, wherever it has a kernel for it, and makes the
same engine of either operator for groups; its Attention operator, from 10.14 on, saves nothing and costs some layers.
The operators of opset 20 know no bfloat16.  Every graph is small; its weights are references into the component's one
weights file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from sd_runtime.bundle.manifest import Graph, Precision

from ..precision import to_bfloat16
from ..weights import save_graph
from .attention import decompose_attention, use_multi_head_attention
from .cuda import MICROSOFT, to_cuda
from .editor import Editor
from .embeds import text_embeds
from .legacy import IR_VERSION, OPSET, to_legacy
from .normalisation import group_norm_by_instance_norm, group_norm_by_means, small_activated_groups
from .products import stack_products
from .tokens import project_tokens, tokens_first

__all__ = ["FORMS", "Form", "rewrite", "text_embeds", "write_forms"]

UNUSED = ("pooler_output",)  # pictures do not need it, and it has operators that GPUs lack


@dataclass(frozen=True)
class Form:
    """How a plain graph becomes this form, and the opset that it is written in afterwards."""

    rewrite: Callable[[Editor], None]
    opset: int = 23
    ir_version: int = 10
    precisions: tuple[Precision, ...] = ("fp32", "fp16")


def _to_cpu(editor: Editor) -> None:
    use_multi_head_attention(editor)
    group_norm_by_instance_norm(editor)


def _to_cuda(editor: Editor) -> None:
    _drop_unused(editor)
    to_cuda(editor)


def _to_tensorrt(editor: Editor) -> None:
    _fewer_launches(editor)
    group_norm_by_instance_norm(editor)


def _to_bfloat16_tensorrt(editor: Editor) -> None:
    to_bfloat16(editor.model)
    _fewer_launches(editor)


def _fewer_launches(editor: Editor) -> None:
    _drop_unused(editor)
    group_norm_by_means(editor, small_activated_groups(editor))
    project_tokens(editor)
    tokens_first(editor)
    stack_products(editor)
    decompose_attention(editor, softmax=ir.DataType.FLOAT)


def _to_legacy_tensorrt(editor: Editor) -> None:
    _drop_unused(editor)
    to_legacy(editor)


def _drop_unused(editor: Editor) -> None:
    outputs = editor.graph.outputs
    outputs[:] = [value for value in outputs if value.name not in UNUSED]
    editor.finish()


FORMS: Mapping[str, Form] = {
    "cpu": Form(_to_cpu, precisions=("fp32",)),  # the CPU provider has no float16 kernels
    "cuda": Form(_to_cuda),
    "trt-basic": Form(_to_tensorrt, opset=20),
    "trt-bf16": Form(_to_bfloat16_tensorrt, precisions=("fp32",)),
    "trt-legacy": Form(_to_legacy_tensorrt, opset=OPSET, ir_version=IR_VERSION),
}


def rewrite(model: ir.Model, form: Form) -> None:
    """Turn a plain graph into `form`, in place."""
    form.rewrite(Editor(model))
    model.graph.sort()
    model.ir_version = form.ir_version
    model.graph.opset_imports[""] = form.opset
    if any(node.domain == MICROSOFT for node in model.graph):
        model.graph.opset_imports[MICROSOFT] = 1


def write_forms(folder: Path, plain: Graph, precision: Precision) -> dict[str, Graph]:
    """Write every form of the graph `plain` of the bundle in `folder` next to it; their entries in the manifest."""
    graphs = {}
    for name, form in FORMS.items():
        if precision not in form.precisions:
            continue
        path = plain.path.replace(".onnx", f"_{name}.onnx")
        model = ir.load(folder / plain.path)
        rewrite(model, form)
        save_graph(model, folder / path)
        graphs[name] = _entry(model, plain, path)
    return graphs


def _entry(model: ir.Model, plain: Graph, path: str) -> Graph:
    """The plain graph's tensors, but for outputs that the form does without."""
    names = [value.name for value in model.graph.outputs]
    return Graph(path, plain.inputs, tuple(spec for spec in plain.outputs if spec.name in names))
