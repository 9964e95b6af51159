"""schema: JSON ↔ dataclasses, strictly; hostile JSON ends in SchemaError, never in anything else."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_runtime.bundle.schema import SchemaError, from_json, parse_json, to_json


@dataclass(frozen=True)
class Leaf:
    number: float
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...]
    by_name: dict[str, Leaf]
    note: str | None = None
    counts: dict[str, int] = field(default_factory=dict)


TREE = Tree("x", (Leaf(1.5), Leaf(2, "b")), {"k": Leaf(0)}, counts={"n": 3})


def test_round_trip() -> None:
    assert from_json(Tree, json.loads(json.dumps(to_json(TREE)))) == TREE


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"name": 3}, r"\$\.name: got 3, accepted str"),
        ({"leaves": [{"number": "1"}]}, r"\$\.leaves\[0\]\.number"),
        ({"leaves": [{"number": True}]}, r"\$\.leaves\[0\]\.number: got True, accepted float"),
        ({"leaves": [{"number": json.loads("1e999")}]}, r"\$\.leaves\[0\]\.number: got inf, accepted finite numbers"),
        ({"leaves": [{"number": 10**400}]}, r"\$\.leaves\[0\]\.number: got 10{78}…, accepted finite numbers"),
        ({"leaves": [{"number": 1, "kind": "c"}]}, r"\$\.leaves\[0\]\.kind: got c, accepted 'a', 'b'"),
        ({"leaves": {}}, r"\$\.leaves"),
        ({"by_name": {"k": {}}}, r"\$\.by_name\.k: missing number"),
        ({"extra": 1}, r"\$: unknown extra"),
        ({"counts": {"n": True}}, r"\$\.counts\.n: got True, accepted int"),
        ({"note": 5}, r"\$\.note"),
    ],
)
def test_errors_name_the_field(change: dict[str, object], path: str) -> None:
    with pytest.raises(SchemaError, match=path):
        from_json(Tree, to_json(TREE) | change)


@pytest.mark.parametrize("text", [b"", b"{", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 100_000, b"\xff\xfe"])
def test_fault_05_hostile_json_is_a_schema_error(text: bytes) -> None:
    with pytest.raises(SchemaError, match="doc"):
        parse_json(text, "doc")


def test_size_limit() -> None:
    with pytest.raises(SchemaError, match="at most 10"):
        parse_json(b"[1, 2, 3, 4, 5]", "doc", limit=10)


LEAVES = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_fault_05_any_json_decodes_or_is_refused(value: object) -> None:
    with suppress(SchemaError):
        from_json(Tree, value)
