"""tensor: the check at an engine's edge says which input, what was got and what is taken."""

from __future__ import annotations

import numpy as np
import pytest
from sd_runtime.errors import BundleError, EngineError
from sd_runtime.tensor import Dim, FeedCheck, TensorSpec, all_finite, check_feeds

SAMPLE = TensorSpec("sample", "float32", (Dim("batch", 1, 2, 8), 4, Dim("height", 8, 64, 128)))
TIMESTEP = TensorSpec("timestep", "float32", ())
HIDDEN = TensorSpec("hidden", "float32", (Dim("batch", 1, 2, 8), 77))


def feeds(**changed: np.ndarray) -> dict[str, np.ndarray]:
    good = {
        "sample": np.zeros((2, 4, 64), np.float32),
        "timestep": np.zeros((), np.float32),
        "hidden": np.zeros((2, 77), np.float32),
    }
    return good | changed


def test_good_feeds_pass() -> None:
    check_feeds((SAMPLE, TIMESTEP, HIDDEN), feeds())


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("sample", np.zeros((2, 4, 64), np.float16), r"'sample': got float16\(2, 4, 64\), accepted float32\(1\.\.8, 4"),
        ("sample", np.zeros((9, 4, 64), np.float32), r"'sample': got float32\(9, 4, 64\)"),
        ("sample", np.zeros((2, 4, 7), np.float32), r"got float32\(2, 4, 7\), accepted .*8\.\.128"),
        ("sample", np.zeros((2, 4), np.float32), r"got float32\(2, 4\)"),
        ("timestep", np.zeros(1, np.float32), r"'timestep': got float32\(1\), accepted float32\(\)"),
        ("hidden", np.zeros((4, 77), np.float32), r"'hidden': axis batch: got 4, accepted 2 as in input 'sample'"),
    ],
)
def test_bad_feeds(name: str, array: np.ndarray, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_feeds((SAMPLE, TIMESTEP, HIDDEN), feeds(**{name: array}))


def test_missing_and_unknown_inputs() -> None:
    with pytest.raises(EngineError, match="engine inputs: got hidden, sample, accepted sample, timestep, hidden"):
        check_feeds((SAMPLE, TIMESTEP, HIDDEN), {k: v for k, v in feeds().items() if k != "timestep"})


def test_feed_check_sees_every_change() -> None:
    check = FeedCheck((SAMPLE, TIMESTEP, HIDDEN))
    for _ in range(2):
        check(feeds())
        check(feeds(sample=np.zeros((2, 4, 8), np.float32)))
        with pytest.raises(EngineError, match="float16"):
            check(feeds(sample=np.zeros((2, 4, 8), np.float16)))
        with pytest.raises(EngineError, match="axis batch"):
            check(feeds(hidden=np.zeros((1, 77), np.float32)))
        with pytest.raises(EngineError, match="engine inputs"):
            check({})


def test_json_round_trip() -> None:
    for spec in (SAMPLE, TIMESTEP):
        assert TensorSpec.from_json(spec.to_json()) == spec


def test_impossible_specs() -> None:
    with pytest.raises(BundleError, match="1 ≤ min ≤ opt ≤ max"):
        Dim("batch", 2, 1, 8)
    with pytest.raises(BundleError, match="dtype: got float8"):
        TensorSpec("x", "float8", ())


def test_all_finite() -> None:
    array = np.ones((3, 5), np.float32)
    assert all_finite(array)
    for bad in (np.nan, np.inf, -np.inf):
        array[1, 2] = bad
        assert not all_finite(array)
    assert not all_finite(np.array([np.inf, -np.inf], np.float32))
