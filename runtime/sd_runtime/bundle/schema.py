"""JSON ↔ frozen dataclasses, strictly: unknown, missing and ill-typed fields are errors that name the field's path.

The type hints are the schema.  Understood: str, int, float, bool, None, unions with None, tuple[X, ...], dict[str, X],
nested dataclasses, Literal, and classes with `to_json` and `from_json` of their own (TensorSpec).
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import BundleError, UsageError, one_line

T = TypeVar("T")


class SchemaError(BundleError):
    """A JSON document does not follow its dataclass; `what` starts with the field's path."""


def to_json(value: Any) -> Any:
    """A dataclass tree as plain JSON values, fields in their declared order."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value


def from_json(cls: type[T], value: Any, path: str = "$") -> T:
    """`value` (as json.loads returns it) as a `cls`; SchemaError names the offending field."""
    result: T = _decode(cls, value, path)
    return result


def parse_json(text: bytes, what: str, limit: int = 64 << 20) -> Any:
    """JSON bytes → values; refuses more than `limit` bytes, duplicate keys, NaN, nesting too deep to parse."""
    if len(text) > limit:
        raise SchemaError(what, got=f"{len(text)} bytes", accepted=f"at most {limit}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, item in pairs:
            if key in out:
                raise SchemaError(f"{what}: duplicate key", got=key)
            out[key] = item
        return out

    def reject(constant: str) -> Any:
        raise SchemaError(what, got=constant, accepted="finite numbers")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=reject)
    except (ValueError, RecursionError) as error:
        if isinstance(error, SchemaError):
            raise
        raise SchemaError(f"{what} is not valid JSON ({one_line(str(error))})") from error


def _decode(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _decode(inner, value, path)
    if origin is Literal:
        if value not in args:
            raise SchemaError(path, got=value, accepted=", ".join(map(repr, args)))
        return value
    if origin is tuple:
        return tuple(_decode(args[0], v, f"{path}[{i}]") for i, v in enumerate(_need(list, value, path)))
    if origin is dict:
        return {k: _decode(args[1], v, f"{path}.{k}") for k, v in _need(dict, value, path).items()}
    if hasattr(hint, "from_json"):
        try:
            return hint.from_json(value)
        except (KeyError, TypeError, ValueError) as error:
            raise SchemaError(path, got=value, accepted=f"a {hint.__name__}") from error
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, _need(dict, value, path), path)
    if hint is float:
        return _decode_float(value, path)
    return _need(hint, value, path)


def _decode_float(value: Any, path: str) -> float:
    """JSON's integers are floats, too; its 1e999 is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SchemaError(path, got=value, accepted="float")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise SchemaError(path, got=value, accepted="finite numbers")
    return number


def _decode_dataclass(cls: Any, value: dict[str, Any], path: str) -> Any:
    hints, fields = get_type_hints(cls), dataclasses.fields(cls)
    required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    missing, unknown = required - set(value), set(value) - {f.name for f in fields}
    if missing or unknown:
        problem = f"missing {', '.join(sorted(missing))}" if missing else f"unknown {', '.join(sorted(unknown))}"
        raise SchemaError(f"{path}: {one_line(problem)}", accepted=", ".join(f.name for f in fields))
    decoded = {k: _decode(hints[k], v, f"{path}.{k}") for k, v in value.items()}
    try:
        return cls(**decoded)
    except UsageError as error:  # of a class that a caller may make, too
        raise SchemaError(f"{path}.{error.what}", got=error.got, accepted=error.accepted) from error


def _need(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise SchemaError(path, got=value, accepted=kind.__name__)
    return value
