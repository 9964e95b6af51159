"""What TensorRT says when it cannot build an engine → what happened, to which layer, and what to change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sd_runtime.errors import ExportError, one_line


class NoKernelError(ExportError):
    """The library has no kernel for a layer of a graph; in another form of the graph it may have."""


@dataclass(frozen=True)
class _Known:
    """A message that has a cause known to us; `kernel`: see `NoKernelError`."""

    pattern: str
    what: str
    remedy: str
    kernel: bool = False


# In order of how much they say: TensorRT logs several messages for one failure, and the last is often the vaguest.
KNOWN = (
    _Known(
        r"CUDA driver version is insufficient|initialization failure with error: 35\b|cudaErrorInsufficientDriver",
        "the GPU's driver is missing, or too old for this TensorRT",
        "install or update the NVIDIA driver, or install an older tensorrt",
    ),
    _Known(
        r"initialization failure with error: (?:100|38|999)\b|no CUDA-capable device|cudaErrorNoDevice",
        "TensorRT finds no usable GPU",
        "check that nvidia-smi lists one, and CUDA_VISIBLE_DEVICES",
    ),
    _Known(
        r"(?:does not support|[Uu]nsupported|Target GPU) .*(?:SM|compute capability) ?\(?([\w.]*)",
        "this TensorRT does not know the GPU",
        "install a tensorrt as new as the GPU (or as old: support for old GPUs ends, too)",
    ),
    _Known(
        r"(?:UNSUPPORTED_NODE|No importer registered for op|Plugin not found).*?[:\s](\w+)\.? ?",
        "this TensorRT's parser does not know an operator of the graph",
        "export the bundle again with this version of sd-lean; if it persists, install a newer tensorrt",
    ),
    _Known(
        r"[Oo]ut ?[Oo]f ?[Mm]emory|CUDA error 2\b|cudaErrorMemoryAllocation|bad_alloc|Requested amount of .*memory",
        "memory ran out while building",
        "close what else uses the GPU, ask for a smaller --batch or --size, or build with --no-fallback",
    ),
    _Known(
        r"[Ii]nsuff?icient (?:workspace|memory on requested)|[Tt]actic .* requested .*[Ww]orkspace"
        r"|within workspace limit",
        "the memory set aside for the layers' scratch space is too small",
        "give more with --workspace, or leave that flag out; without it, ask for a smaller --size or --batch",
    ),
    _Known(
        r"is_decomposable\(\)|not supported by a dedicated kernel",
        "TensorRT has no fused kernel for an attention that it may not take apart",
        "export the bundle again with this version of sd-lean, whose graphs have no such attention",
        kernel=True,
    ),
    _Known(
        r"HW-specific datatypes",
        "the GPUs that the engine is for lack a type of numbers that the graph has",
        "build with --precision fp16 from a fp16 bundle, or leave out --turing",
    ),
    _Known(
        r"graph_jit\.cpp.*CUDA_SUCCESS",
        "TensorRT needs a GPU to build such an engine",
        "build it on a machine with an NVIDIA GPU and its driver",
    ),
    _Known(
        r"for Turing .*not supported",
        "TensorRT for RTX has no such layer for Turing",
        "nothing needs to be done: ONNX Runtime stands in for this engine",
    ),
    _Known(
        r"[Cc]ould not find any implementation for node (.+?)\.?(?: due to| \[|$)",
        "TensorRT has no kernel for a layer",
        "give more scratch space with --workspace, try another --precision, or another version of tensorrt",
        kernel=True,
    ),
    _Known(
        r"(?:kMIN|kOPT|kMAX|[Oo]ptimization profile|[Pp]rofile \d).*",
        "TensorRT does not take the range of shapes",
        "ask for other --size and --batch, or build with --no-fallback",
    ),
    _Known(
        r"[Ff]ailed to (?:open|read) file|[Ww]eightsFile|external data",
        "TensorRT cannot read the graph's weights",
        "check that the bundle is complete: export it again",
    ),
)

# Where in the library's source a message comes from, and what it calls every failure: they hide what the failure is.
_SOURCE = re.compile(
    r"IBuilder::\w+: |\[?\b[\w/]+\.(?:cpp|h)(?:::?[\w ]+)*\]?:? |MyelinCheckException: |\.?;? *In compileGraph at .*"
    r"|(?:Error Code )?\d+: (?=\w)|(?:Internal Error|Myelin) \((?=.)"
)

# A layer's name: in braces, where several were made one; else to where the sentence goes on.  Names hold blanks and
# dots of their own: "(Unnamed Layer* 12) [Shuffle]", "/conv1/Conv + /nonlinearity/Sigmoid".
_NODE = re.compile(
    r"(?:for node |with name: )(?:\{(?P<group>.+?)\}(?=[\s.,)]|$)"
    r"|(?P<name>.+?)(?:\.?$|\.\)|\. | \[\w+\.cpp| due to | and operator))"
    r"|(?:[Nn]ode name: |node: )\{?(?P<word>\S+?)\}?[.,)]*(?:\s|$)",
    re.MULTILINE,
)


def explain(label: str, messages: Sequence[str]) -> ExportError:
    """The failure to build the engine `label`, from the errors that TensorRT logged, first to last.

    NoKernelError: another form of the graph may do."""
    text = "\n".join(messages)
    for known in KNOWN:
        if re.search(known.pattern, text):
            where = failed_node(text)
            what = f"building {label}: {known.what}" + (f", at {where}" if where else "")
            kind = NoKernelError if known.kernel else ExportError
            return kind(f"{what} ({_shortest(known.pattern, messages)})", remedy=known.remedy)
    causes = [cause(message) for message in messages[:3]]  # what follows the first is what follows from it
    said = one_line(" | ".join(causes), 400) if causes else "TensorRT gives no reason"
    return ExportError(f"building {label} failed: {said}")


def cause(message: str) -> str:
    """A message without where in the library's source it comes from."""
    found = _SOURCE.sub("", message).strip()
    return (found[:-1] if found.count(")") > found.count("(") and found.endswith(")") else found) or message


def failed_node(text: str) -> str | None:
    """The layer that a message is about, as the graph names it; `{ForeignNode[first...last]}` is a fused group."""
    found = _NODE.search(text)
    if found is None:
        return None
    name = next(name for name in found.groups() if name is not None).strip()
    group = re.fullmatch(r"ForeignNode\[(.+?)\.\.\.(.+)\]", name)
    return one_line(f"the layers from {group.group(1)} to {group.group(2)}" if group else name, 200)


def _shortest(pattern: str, messages: Sequence[str]) -> str:
    return one_line(cause(min((m for m in messages if re.search(pattern, m)), key=len, default=messages[0])), 200)
