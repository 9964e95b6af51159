"""scripts/gpu_check.py without a GPU: it starts, skips what is not there, goes on where it stopped, judges rightly."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu_check import bars, elsewhere, main, wrong
from gpu_timing import MOST_RUNS, CheckOptions, Row, latencies


def verdict(done: dict[str, Any], gpu: str = "NVIDIA H200") -> list[str]:
    return wrong({"gpu": gpu}, done, list(bars(done)))


def run(work: Path, *flags: str) -> int:
    return main(["--dry-run", "--work", str(work), *flags])


def test_a_rehearsal_says_what_it_cannot_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--only", "noise", "sd15-tensorrt", "torch-compile", "--json", str(tmp_path / "out.json")) == 0
    said = capfd.readouterr().out
    assert "noise: 8 known CUDA values, largest difference" in said and "≤ 6e-05 ok" in said
    assert "-- sd15-tensorrt: skipped, " in said and "-- torch-compile: skipped, not rehearsed" in said
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["gpu"] == "rehearsal on a CPU"
    assert written["sections"]["noise"]["rows"][0]["limit"] == 6e-5


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempted = []

    def attempt(section: gpu_check.Section, *_: object) -> dict[str, object]:
        attempted.append(section.name)
        return {"rows": [], "why": "" if section.name == "noise" else "no time", "seconds": 0.0, "at": "today"}

    monkeypatch.setattr(gpu_check, "attempt", attempt)
    for _ in range(2):
        run(tmp_path, "--only", "noise", "demo-export")
    assert attempted == ["noise", "demo-export", "demo-export"]
    run(tmp_path, "--only", "noise", "--json", str(tmp_path / "again.json"))
    assert len(attempted) == 3 and "noise" in json.loads((tmp_path / "again.json").read_text())["sections"]
    run(tmp_path, "--only", "noise", "--fresh")
    assert attempted[3:] == ["noise"]


def test_no_section_is_started_that_would_end_too_late(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--only", "noise", "--minutes", "0.25") == 0
    assert "-- noise: skipped, no time left: start again to go on" in capfd.readouterr().out


def test_what_was_measured_before_the_time_was_up_is_kept_and_all_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the section has started itself, which would go on using the GPU."""
    child = tmp_path / "child"
    row = json.dumps(vars(Row("noise: so far", 1.0, "s")))
    program = f"""import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(child)!r}, "w").write(str(child.pid))
open(sys.argv[1], "a").write({row!r} + "\\n" + '{{"what": "noi')
time.sleep(60)
"""
    monkeypatch.setattr(gpu_check, "own_command", lambda s, t, rows: [sys.executable, "-c", program, str(rows)])
    section = gpu_check.SECTIONS[0]
    done = gpu_check.in_process(section, CheckOptions(tmp_path, dry=True), 3.0)
    assert [row["what"] for row in done["rows"]] == ["noise: so far"]
    assert done["why"] == gpu_check.NO_TIME
    for _ in range(100):
        stat = Path("/proc", child.read_text(), "stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


def test_other_code_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempted = []

    def attempt(section: gpu_check.Section, *_: object) -> dict[str, object]:
        attempted.append(section.name)
        return {"rows": [], "why": "", "seconds": 0.0, "at": "today"}

    monkeypatch.setattr(gpu_check, "attempt", attempt)
    run(tmp_path, "--only", "noise")
    run(tmp_path, "--only", "noise")
    assert attempted == ["noise"]
    monkeypatch.setattr(gpu_check, "describe", lambda dry: {"gpu": "none", "code": "other"})
    run(tmp_path, "--only", "noise")
    assert attempted == ["noise", "noise"]


def test_promises_take_in_what_another_python_has_measured(tmp_path: Path) -> None:
    """TensorRT's may not be the one that has torch."""
    theirs = {"rows": [vars(Row("sd15, torch.compile max-autotune: 50 steps, batch 1", 0.7, "s"))], "why": ""}
    machine = {"gpu": "NVIDIA H200", "code": "c0de", "python": "3.12"}
    for name, of in (("one", machine), ("two", machine | {"gpu": "NVIDIA T4"}), ("three", machine | {"code": "other"})):
        content = {"machine": of, "sections": {f"torch {name}": theirs}}
        (tmp_path / f"results-{name}.json").write_text(json.dumps(content))
    found = elsewhere(tmp_path / "results-mine.json", machine | {"python": "3.10"})
    assert found == {"torch one of results-one": theirs}


def test_promises_are_judged() -> None:
    def done(**changed: float) -> dict[str, Any]:
        values = {"ours": 0.5, "p99": 0.52, "theirs": 0.7, "host": 0.4} | changed
        rows = [
            Row("sd15, tensorrt: 50 steps, batch 1", values["ours"], "s", runs=20, p95=0.51, p99=values["p99"]),
            Row("sd15, torch.compile max-autotune: 50 steps, batch 1", values["theirs"], "s"),
            Row("sd15, tensorrt: host time of a step, batch 1", values["host"], "% of it"),
            Row("noise", 1.0, "", limit=changed.get("limit", 2.0)),
        ]
        if "faster" in changed:
            rows.append(Row("sd15, onnxruntime: 50 steps, batch 1", changed["faster"], "s"))
        return {"one": {"rows": [vars(row) for row in rows], "why": ""}}

    assert [round(value, 2) for _, value, _ in bars(done())] == [1.4, 0.4, 1.04]
    assert not verdict(done())
    assert verdict(done(theirs=0.55)) == ["50 steps, batch 1: torch.compile's time over tensorrt's"]
    assert verdict(done(p99=0.6)) == ["tensorrt: 50 steps, batch 1: p99 over p50"]
    assert verdict(done(host=1.5)) == ["tensorrt: host time of a step, batch 1, in per cent of it"]
    assert verdict(done(limit=0.5)) == ["noise"]
    faster = done(faster=0.4)
    assert [round(value, 2) for _, value, _ in bars(faster)] == [1.75]
    assert next(bars(faster))[0] == "50 steps, batch 1: torch.compile's time over onnxruntime's"
    assert not verdict(done(theirs=0.55, p99=0.6, host=1.5), "NVIDIA T4") and list(bars(done()))
    assert verdict({"two": {"rows": [], "why": "failed with exit code 1; see above"}}) == ["two"]


def test_a_step_is_the_difference_between_many_and_few(tmp_path: Path) -> None:
    drawn: list[tuple[int, int]] = []
    rows = list(latencies(CheckOptions(tmp_path, dry=True), "x", lambda *call: drawn.append(call), batches=(1,)))
    assert {row.what for row in rows} >= {"x: 2 steps, batch 1", "x: 4 steps, batch 1"}
    assert rows[0].runs == MOST_RUNS and rows[0].p99 is not None and rows[0].p95 is not None
    assert set(drawn) == {(2, 1), (3, 1), (4, 1)}
