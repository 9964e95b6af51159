"""Which evaluations share a run: the curve of an engine, and the two policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from sd_runtime.errors import UsageError
from sd_runtime.serve.curve import Curves, StepCurve, measure, widths
from sd_runtime.serve.limits import Limits
from sd_runtime.serve.policy import choose

FLAT = StepCurve({1: 1.0, 8: 1.0})  # rows cost nothing
LINEAR = StepCurve({1: 1.0, 8: 8.0})  # rows gain nothing
RTX3060 = StepCurve({1: 5.0, 4: 17.7, 8: 33.7})  # published: docs/serving.md


@dataclass(frozen=True)
class Wanted:
    name: str
    left: int = 10
    arrived: float = 0.0
    priority: int = 0
    kind: str = "64x64"
    rows: int = 1


def names(waiting: list[Wanted], curve: StepCurve, policy: Any, now: float = 0.0, **more: Any) -> str:
    return "".join(one.name for one in choose(waiting, lambda one: curve, now, policy, **more))


ALIKE = [Wanted(name) for name in "abcdefgh"]


@pytest.mark.parametrize("policy", ["latency", "throughput"])
def test_rows_that_cost_nothing_are_shared_and_those_that_gain_nothing_are_not(policy: str) -> None:
    assert names(ALIKE, FLAT, policy) == "abcdefgh"
    assert names(ALIKE, LINEAR, policy) == "a"


def test_a_gain_in_throughput_is_taken_for_latency_only_where_many_wait() -> None:
    """Two together take 1.8 times one: alone they end at 1 and 2 with a mean of 1.5, together both at 1.8."""
    assert names(ALIKE[:2], RTX3060, "latency") == "a"
    assert names(ALIKE[:2], RTX3060, "throughput") == "ab"
    crowd = [Wanted(f"{n:02}") for n in range(40)]
    assert len(choose(crowd, lambda one: RTX3060, 0.0, "latency")) > 1


@pytest.mark.parametrize("policy", ["latency", "throughput"])
def test_the_shortest_goes_first_and_ages(policy: str) -> None:
    long, short = Wanted("l", left=50), Wanted("s", left=4, arrived=100.0)
    assert names([long, short], LINEAR, policy, now=100.0) == "s"
    waited = Wanted("w", left=50, arrived=-900.0)  # 1000 s, worth 50 s of work
    assert names([waited, short], LINEAR, policy, now=100.0) == "w"


def test_priority_is_before_all_else() -> None:
    assert names([Wanted("a", left=1), Wanted("b", left=900, priority=1)], LINEAR, "latency") == "b"
    assert names([Wanted("a", priority=1), Wanted("b")], FLAT, "throughput") == "a"  # the lower one does not slow it


def test_other_shapes_and_numbers_of_rows_that_no_engine_takes_do_not_share() -> None:
    waiting = [Wanted("a"), Wanted("b", kind="96x64"), Wanted("c")]
    assert names(waiting, FLAT, "throughput") == "ac"
    assert names(ALIKE[:4], FLAT, "throughput", fits={1, 2}.__contains__) == "ab"
    guided = [Wanted(name, rows=2) for name in "abc"]
    assert names(guided, FLAT, "throughput", fits={2, 4}.__contains__) == "ab"
    assert names(guided, FLAT, "throughput", fits=lambda rows: False) == "a"


def test_the_curve_is_a_line_between_what_was_measured_and_goes_on() -> None:
    curve = StepCurve({2: 2.0, 4: 3.0, 8: 4.0})
    assert [curve.seconds(rows) for rows in (1, 2, 3, 4, 6, 8, 16)] == [2.0, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0]
    assert StepCurve({2: 5.0}).seconds(7) == 5.0
    assert StepCurve({1: 2.0, 2: 1.0}).seconds(4) == 1.0  # noise never makes more rows cheaper


def test_the_curve_learns_and_one_hiccup_does_not_spoil_it() -> None:
    curve = StepCurve({1: 1.0})
    for _ in range(100):
        curve.observe(1, 2.0)
    assert curve.seconds(1) == pytest.approx(2.0, rel=0.01)
    curve.observe(1, 1000.0)
    assert curve.seconds(1) < 3.0
    curve.observe(3, 6.0)
    assert curve.seconds(3) > curve.seconds(1)


def test_a_shape_that_was_not_measured_begins_by_its_area() -> None:
    curves = Curves((4, 16, 16), StepCurve({1: 1.0, 2: 1.5}))
    assert curves.of((4, 16, 32)).seconds(2) == 3.0
    curves.of((4, 16, 32)).observe(2, 13.0)
    assert curves.of((4, 16, 16)).seconds(2) == 1.5


def test_warming_up_is_not_measured() -> None:
    asked: list[int] = []
    measure(asked.append, [1, 4], repeats=2)
    assert asked == [1, 1, 1, 4, 4, 4]
    assert widths(range(1, 33)) == [1, 2, 4, 8, 16, 32]
    assert widths([2, 3, 6]) == [2, 6]


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"rows": 1}, {"hang_after": 0.0}, {"hang_after": float("nan")}])
def test_limits_have_ranges(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Limits(**wrong)
