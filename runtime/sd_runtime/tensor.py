"""TensorSpec: the name, dtype and shape range of one tensor at an engine's edge, declared once.

ONNX dynamic axes, TensorRT profiles, the manifest's tensor lists and the check at run time all derive from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, EngineError

Array = NDArray[Any]


class Shaped(Protocol):
    """What the check at an engine's edge needs to know of a tensor, wherever it lies."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


DTYPES = ("float32", "float16", "int64", "int32", "uint8", "bool")


@dataclass(frozen=True)
class Dim:
    """One axis that varies: its symbolic name and the sizes it takes (inclusive), `opt` being the one tuned for."""

    symbol: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not (1 <= self.min <= self.opt <= self.max):
            raise BundleError(f"axis {self.symbol}", got=(self.min, self.opt, self.max), accepted="1 ≤ min ≤ opt ≤ max")

    def __str__(self) -> str:
        return f"{self.min}..{self.max}"

    @classmethod
    def from_json(cls, value: Any) -> Dim:
        """[symbol, min, opt, max]; TypeError, ValueError: it is not."""
        symbol, *sizes = value
        if not isinstance(symbol, str) or len(sizes) != 3 or any(type(size) is not int for size in sizes):
            raise TypeError(f"axis {value!r}")
        return cls(symbol, *sizes)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor at an engine's edge: fixed axes are integers, varying ones are `Dim`."""

    name: str
    dtype: str
    shape: tuple[int | Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BundleError(f"tensor '{self.name}': dtype", got=self.dtype, accepted=", ".join(DTYPES))

    def __str__(self) -> str:
        return f"{self.dtype}({', '.join(map(str, self.shape))})"

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The smallest and the largest size of each axis."""
        return tuple((axis.min, axis.max) if isinstance(axis, Dim) else (axis, axis) for axis in self.shape)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(
            low <= size <= high for size, (low, high) in zip(shape, self.ranges, strict=True)
        )

    def check(self, array: Shaped) -> None:
        """Raise EngineError unless `array` has this spec's dtype and a shape in its range."""
        if array.dtype.name != self.dtype or not self.accepts(array.shape):
            got = f"{array.dtype.name}({', '.join(map(str, array.shape))})"
            raise EngineError(f"input '{self.name}'", got=got, accepted=str(self))

    def to_json(self) -> dict[str, Any]:
        shape = [[d.symbol, d.min, d.opt, d.max] if isinstance(d, Dim) else d for d in self.shape]
        return {"name": self.name, "dtype": self.dtype, "shape": shape}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorSpec:
        name, axes = value["name"], value["shape"]
        if not isinstance(name, str) or not isinstance(axes, list):
            raise TypeError(f"name {name!r}, shape {axes!r}")
        shape = tuple(axis if type(axis) is int else Dim.from_json(axis) for axis in axes)
        if any(isinstance(axis, int) and axis < 1 for axis in shape):
            raise ValueError(f"shape {axes!r}")
        return cls(name, value["dtype"], shape)


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, Shaped]) -> None:
    """Raise EngineError unless `feeds` holds exactly the tensors in `specs`, each of its dtype and shape range."""
    names = [spec.name for spec in specs]
    if sorted(names) != sorted(feeds):
        raise EngineError("engine inputs", got=", ".join(sorted(feeds)), accepted=", ".join(names))
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        array = feeds[spec.name]
        spec.check(array)
        for axis, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(axis, Dim) and sizes.setdefault(axis.symbol, (size, spec.name))[0] != size:
                known, where = sizes[axis.symbol]
                raise EngineError(
                    f"input '{spec.name}': axis {axis.symbol}", got=size, accepted=f"{known} as in input '{where}'"
                )


def check_names(what: str, specs: tuple[TensorSpec, ...], actual: Iterable[str]) -> None:
    """Raise EngineError unless a graph's inputs (so ends `what`) are those in `specs`, or its outputs hold them all."""
    declared, names = {spec.name for spec in specs}, set(actual)
    if declared - names or (what.endswith("inputs") and declared != names):
        raise EngineError(
            f"{what} differ from the manifest",
            got=", ".join(sorted(names)),
            accepted=", ".join(sorted(declared)),
        )


class FeedCheck:
    """`check_feeds` for an engine that is called again and again: shapes that were accepted last time cost little."""

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self._specs = specs
        self._accepted: list[tuple[str, tuple[int, ...], np.dtype[Any]]] | None = None

    def __call__(self, feeds: Mapping[str, Shaped]) -> None:
        signature = [(name, tensor.shape, tensor.dtype) for name, tensor in feeds.items()]
        if signature != self._accepted:
            check_feeds(self._specs, feeds)
            self._accepted = signature


def check_outputs(
    what: str,
    inputs: tuple[TensorSpec, ...],
    feeds: Mapping[str, Shaped],
    outputs: tuple[TensorSpec, ...],
    found: Mapping[str, Array],
) -> None:
    """Raise EngineError, naming `what` made them, unless outputs have the dtypes and shapes that their specs say.

    An axis has the size that its symbol has in the inputs, also times or by a number ("height / 8")."""
    sizes = {
        axis.symbol: size
        for spec in inputs
        for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(axis, Dim)
    }
    for spec in outputs:
        array = found[spec.name]
        known = isinstance(array, np.ndarray) and array.dtype.name == spec.dtype and spec.accepts(array.shape)
        expected = [_size(axis, sizes) for axis in spec.shape]
        if not known or any(size not in (None, n) for size, n in zip(expected, array.shape, strict=True)):
            got = f"{array.dtype.name}{array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            axes = ", ".join(
                str(axis if size is None else size) for size, axis in zip(expected, spec.shape, strict=True)
            )
            raise EngineError(f"{what}: output '{spec.name}'", got=got, accepted=f"{spec.dtype}({axes})")


def _size(axis: int | Dim, sizes: Mapping[str, int]) -> int | None:
    """The size that an output's axis must have; None: any in its range."""
    if not isinstance(axis, Dim):
        return axis
    symbol, operator, number = [*axis.symbol.split(" "), "*", "1"][:3]
    size = sizes.get(symbol)
    if size is None or operator not in ("*", "/") or not (number.isascii() and number.isdigit() and int(number)):
        return None
    return size * int(number) if operator == "*" else size // int(number)


def all_finite(array: Array) -> bool:
    """Whether `array` holds neither NaN nor infinity."""
    return bool(np.isfinite(array).all())
