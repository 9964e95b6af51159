"""The policies on simulated GPUs, whose clock is simulated as well: what each promises, at every load."""

from __future__ import annotations

import pytest
from serve_simulation import CURVES, compare, curve_of


@pytest.mark.parametrize("load", [0.3, 0.8, 0.95, 1.2, 2.0])
@pytest.mark.parametrize("curve", CURVES)
def test_no_policy_is_worse_than_first_come_first_served_in_its_own_measure(curve: str, load: float) -> None:
    found = compare(curve_of(curve), load, 1200, seed=5)
    fcfs, equal = found["fcfs"], found["equal"]
    assert found["latency"].mean <= fcfs.mean and found["latency"].p50 <= fcfs.p50
    assert found["throughput"].rate >= 0.999 * fcfs.rate
    assert found["throughput"].rate >= 0.98 * equal.rate  # which serves other requests where the queue is full
    assert found["latency"].rate >= 0.999 * fcfs.rate


@pytest.mark.parametrize("curve", CURVES)
def test_short_requests_do_not_wait_for_long_ones(curve: str) -> None:
    found = compare(curve_of(curve), 0.8, 1200, seed=6)
    for policy in ("latency", "throughput"):
        assert found["fcfs"].short_p99 >= 3 * found[policy].short_p99


def test_everybody_is_served_or_refused() -> None:
    found = compare(curve_of("v100"), 2.0, 400, seed=7)
    assert found["fcfs"].refused > found["throughput"].refused > 0
