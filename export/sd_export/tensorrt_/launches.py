"""What a GPU would launch for a graph, counted without one: TensorRT for RTX builds its engines on any machine, and its
log lists every layer of the engine with the tensors that it reads and writes.

One layer is one launch, but for those that compute shapes on the host or let one stream wait for another.  Bytes are
those of the tensors, weights left out; what a kernel reads twice counts once.  Nothing is timed: fewer is better only
where the kernels are of a kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sd_runtime.errors import ExportError

BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int32": 4, "Int64": 8, "Bool": 1, "Int8": 1, "UInt8": 1}
NO_LAUNCH = ("shape_call", "reshape", "cast", "signal", "wait")  # sizes of axes that vary, on the host; other streams
FUSED_ATTENTION = "mha"
CLEAR = "Clear"  # fills a tensor with zeros for the kernel that follows

_LAYER = re.compile(
    r"Name: (.+?), LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[.*?\], Outputs: \[(.*?)\], TacticName"
)
_TENSOR = re.compile(r"Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
_GENERATED = re.compile(r"__myl_([A-Za-z]+?)_myl\d")  # a kernel made of the operations in its name
_MOVE = re.compile(r"(?:Cast|Resh|Tran|Slic|Move|Repl|Conc)+")  # what a generated kernel does that computes nothing
_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")


@dataclass(frozen=True)
class Tensor:
    """What a layer reads or writes; -1 is the size of an axis that varies."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """0 for a tensor with an axis that varies."""
        return 0 if -1 in self.shape else math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, what kind it is of, and its tensors.

    kind   mha: a fused attention; gemm, correlation (a convolution): a library's kernel; Clear: fills with zeros;
           else the operations that a generated kernel does one after the other, "CastMeanSub…"""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Account:
    """An engine as its builder describes it.

    launches     in the order of execution
    activations  bytes of GPU memory for what lies between the layers
    weights      bytes"""

    launches: tuple[Launch, ...]
    activations: int
    weights: int

    @property
    def bytes(self) -> int:
        """Read and written by all launches."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def moves(self) -> int:
        """How many launches compute nothing: casts, copies, other layouts."""
        return sum(_MOVE.fullmatch(launch.kind) is not None for launch in self.launches)

    def of(self, kind: str) -> int:
        """How many launches are of a kind."""
        return sum(launch.kind == kind for launch in self.launches)


def read_account(log: Iterable[str]) -> Account:
    """From the messages of one build, those of VERBOSE included.  ExportError: they describe no engine."""
    messages = [*log]
    memory = {what: int(count) for text in messages for what, count in _MEMORY.findall(text)}
    listing = next((text for text in messages if text.startswith("Layers:")), "")
    launches = tuple(_launches(listing))
    if not launches or not {"Activation", "Weights"} <= memory.keys():
        raise ExportError("the builder's log lists no layers, or in another way than that of TensorRT for RTX 1.7")
    return Account(launches, memory["Activation"], memory["Weights"])


def _launches(listing: str) -> Iterator[Launch]:
    for line in listing.splitlines():
        found = _LAYER.match(line)
        if found is None or found[2] in NO_LAUNCH:
            continue
        inputs, outputs = (tuple(_tensors(found[part])) for part in (3, 4))
        yield Launch(found[1], _kind(found[1], found[2], inputs), inputs, outputs)


def _tensors(text: str) -> Iterator[Tensor]:
    for shape, dtype in _TENSOR.findall(text):
        yield Tensor(tuple(int(size) for size in shape.split(",") if size), dtype)


def _kind(name: str, layer: str, inputs: tuple[Tensor, ...]) -> str:
    if "_mha_" in name:
        return FUSED_ATTENTION
    generated = _GENERATED.match(name)
    if generated is None:
        return layer
    return CLEAR if generated[1] == "Move" and not inputs else generated[1]
