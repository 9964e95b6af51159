"""sd-bench: percentiles, the clock of each stage, open load, other processes, the peer, and what is written."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bundle_with_engines import VERSION, copy_with_engines
from fake_cuda import FakeGpu
from fake_tensorrt import FakeTensorRT
from fresh_interpreter import HELP, modules_after
from hypothesis import given
from hypothesis import strategies as st
from sd_runtime.bench import report
from sd_runtime.bench.baseline import Baseline, Change
from sd_runtime.bench.baseline import main as check_baseline
from sd_runtime.bench.benchmark import Plan, Results, cold_command, measure
from sd_runtime.bench.cli import main
from sd_runtime.bench.comparison import Compared, find_checkpoint, peer_settings, warm_peer
from sd_runtime.bench.distribution import Distribution
from sd_runtime.bench.load import due_times, measure_load
from sd_runtime.bench.machine import describe_machine, physical_cores
from sd_runtime.bench.processes import GpuMemory, run
from sd_runtime.bench.stages import STAGES, measure_batches, open_timed, time_picture, varied
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import Source
from sd_runtime.bundle.schema import from_json
from sd_runtime.cli.reports import check_report, write_report
from sd_runtime.errors import BundleError, SDError, UsageError
from sd_runtime.loop.device import DeviceDenoiser
from sd_runtime.loop.guidance import Guidance
from sd_runtime.request import Request, make_request

SMALL = {"num_inference_steps": 2, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def request_(bundle: Bundle) -> Request:
    return make_request(bundle.manifest.defaults, "a red star", seed=3, **SMALL)


@pytest.fixture(scope="module")
def results(bundle: Bundle, request_: Request) -> Results:
    """Of everything that needs no other program."""
    plan = Plan(
        request_, "cpu", rounds=3, warmup=1, cold=1, batches=(1, 2), rates=(30.0, 60.0), duration=0.2, arrivals="fixed"
    )
    return measure(bundle, plan)


# ---- percentiles -----------------------------------------------------------------------------------------------------


def test_percentiles_are_nearest_ranks() -> None:
    found = Distribution.of([float(i) for i in range(1, 101)][::-1])
    assert (found.p50, found.p90, found.p95, found.p99) == (50, 90, 95, 99)
    assert found.mean == 50.5 and found.count == 100


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=50))
def test_percentiles_are_measured_values_in_order(values: list[float]) -> None:
    found = Distribution.of(values)
    assert min(values) <= found.p50 <= found.p90 <= found.p95 <= found.p99 <= max(values)
    assert {found.p50, found.p99} <= set(values)


def test_nothing_measured() -> None:
    with pytest.raises(UsageError, match="at least one"):
        Distribution.of([])


# ---- load ------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that only the work and the waiting move."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def serve_with(clock: Clock, seconds: list[float]) -> Any:
    def serve(number: int) -> None:
        clock.now += seconds[number]

    return serve


def test_latency_counts_from_when_a_request_was_due() -> None:
    """One slow answer makes the next requests late although each is served quickly: 3, 2.1, 1.2 and 0.3 seconds."""
    clock = Clock()
    point = measure_load([0, 1, 2, 3], 1.0, serve_with(clock, [3, 0.1, 0.1, 0.1]), clock=clock, sleep=clock.sleep)
    assert point.latency.p50 == pytest.approx(1.2)
    assert point.latency.p99 == pytest.approx(3)
    assert point.latency.mean == pytest.approx((3 + 2.1 + 1.2 + 0.3) / 4)
    assert point.busy == pytest.approx(1) and point.unserved == 0
    assert clock.slept == []


def test_nothing_is_served_before_it_is_due() -> None:
    clock = Clock()
    point = measure_load([0.5, 2.0], 1.0, serve_with(clock, [0.25, 0.25]), clock=clock, sleep=clock.sleep)
    assert clock.slept == pytest.approx([0.5, 1.25])
    assert point.latency.p99 == pytest.approx(0.25)
    assert point.busy == pytest.approx(0.5 / 2.25)


def test_a_load_that_cannot_be_served_is_given_up() -> None:
    clock = Clock()
    due = [i / 10 for i in range(100)]
    point = measure_load(due, 10.0, serve_with(clock, [5.0] * 100), clock=clock, sleep=clock.sleep)
    assert 0 < point.unserved == 100 - round(point.served * (clock.now - 100))
    assert point.latency.p50 > 10


def test_due_times() -> None:
    assert due_times(4, 1, "fixed") == [0, 0.25, 0.5, 0.75]
    poisson = due_times(50, 100, "poisson", seed=1)
    assert poisson == due_times(50, 100, "poisson", seed=1) != due_times(50, 100, "poisson", seed=2)
    assert poisson == sorted(poisson) and poisson[0] > 0 and poisson[-1] < 100
    assert len(poisson) == pytest.approx(5000, rel=0.05)
    gaps = [b - a for a, b in pairwise(poisson)]
    assert Distribution.of(gaps).p50 == pytest.approx(math.log(2) / 50, rel=0.1)  # of an exponential distribution
    assert due_times(0.001, 1, "fixed") == due_times(0.001, 1, "poisson", seed=3) == [0]


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_stages_add_up(bundle: Bundle, request_: Request) -> None:
    """What is measured apart is the whole, but for what lies between."""
    pipeline, calls = open_timed(bundle, "cpu")
    with pipeline:
        time_picture(pipeline, calls, request_)
        times = time_picture(pipeline, calls, request_)
        evaluations = len(pipeline.plan(request_))
    assert set(times) == set(STAGES)
    assert len(times["unet"]) == len(times["host"]) == evaluations
    assert all(seconds >= 0 for stage in times.values() for seconds in stage)
    parts = sum(sum(times[stage]) for stage in STAGES if stage != "picture")
    assert 0.8 * times["picture"][0] < parts <= times["picture"][0] * 1.001


def test_a_slow_stage_shows_where_it_is(bundle: Bundle, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_runtime.engines.onnxruntime_.cpu import OnnxRuntimeEngine

    original = OnnxRuntimeEngine.run

    def slow(self: OnnxRuntimeEngine, feeds: Any) -> Any:
        if "timestep" in feeds:
            time.sleep(0.03)
        return original(self, feeds)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", slow)
    pipeline, calls = open_timed(bundle, "cpu")
    with pipeline:
        times = time_picture(pipeline, calls, request_)
    assert min(times["unet"]) >= 0.03
    assert sum(times["text"]) < 0.03 and max(times["host"]) < 0.03


def test_batches(bundle: Bundle, request_: Request) -> None:
    pipeline, _ = open_timed(bundle, "cpu")
    with pipeline:
        found = measure_batches(pipeline, request_, (1, 3), rounds=1)
        evaluations = len(pipeline.plan(request_))
    assert [batch.images for batch in found] == [1, 3]
    assert all(b.steps_per_second == pytest.approx(b.images_per_second * evaluations) for b in found)


def test_rounds_differ_in_words_and_seeds(request_: Request) -> None:
    assert varied(request_) == request_
    third = varied(request_, 3, images=2)
    assert third.prompts == ("a red star, 3",) and third.seeds == (6, 7) and third.num_images == 2


# ---- processes -------------------------------------------------------------------------------------------------------


def test_cost_of_a_process() -> None:
    """Asked for by a small process, as sd-bench does: a child's peak memory starts from that of its parent."""
    child = "import time; x = bytearray(200_000_000); time.sleep(0.2)"
    program = (
        "import sys; from sd_runtime.bench.processes import run\n"
        f"cost = run([sys.executable, '-c', {child!r}]); print(cost.seconds, cost.megabytes)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    seconds, megabytes = map(float, told.split())
    assert 0.2 < seconds < 30
    assert 200 < megabytes < 300


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(SDError, match="ended with 3: no luck"):
        run([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"])


def test_gpu_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a fake nvidia-smi that tells of 100 MiB first and of 350 later."""
    state, program = tmp_path / "state", tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nif [ -e {state} ]; then echo 350; else echo 100; touch {state}; fi\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with GpuMemory() as gpu:
        deadline = time.monotonic() + 10
        while gpu.peak == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert gpu.peak == pytest.approx(250 * 1.048576)
    program.write_text("#!/bin/sh\necho no devices were found; exit 6\n")
    with GpuMemory() as gpu:
        pass
    assert gpu.peak is None


def test_machine() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    machine = describe_machine()
    assert machine["cores"] == str(physical_cores()) and "numpy" in machine


# ---- the peer --------------------------------------------------------------------------------------------------------


def test_diffusers_draws_the_same_beside(bundle: Bundle, request_: Request) -> None:
    settings = peer_settings(
        replace(request_, scheduler="euler"), find_checkpoint(None, bundle.manifest), bundle.manifest, "cpu"
    )
    with warm_peer(settings | {"threads": 1}) as draw:
        times = draw("a red star", 1)
        again = draw("a blue ring", 2)
    assert times["picture"] > 0 and len(times["steps"]) == 1  # two steps, of which the first begins unseen
    assert again["picture"] > sum(again["steps"]) > 0


def test_a_peer_that_cannot_start(bundle: Bundle, request_: Request) -> None:
    settings = peer_settings(request_, "/no/such/model", bundle.manifest, "cpu")
    with warm_peer(settings) as draw, pytest.raises(SDError, match="ended before it had drawn"):
        draw("a red star", 1)


def test_where_the_peer_s_weights_are(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert find_checkpoint("here", manifest) == "here"
    assert Path(find_checkpoint(None, manifest), "model_index.json").is_file()
    assert find_checkpoint(None, replace(manifest, source=Source("owner/name", "c0ffee", {}))) == "owner/name"
    with pytest.raises(BundleError, match="name it with --checkpoint MODEL"):
        find_checkpoint(None, replace(manifest, source=Source("a-folder", None, {})))


def test_peer_settings_are_diffusers_words(bundle: Bundle, request_: Request) -> None:
    settings = peer_settings(replace(request_, scheduler="dpmpp_2m_karras"), "x", bundle.manifest, "cpu")
    assert settings["scheduler"]["class_name"] == "DPMSolverMultistepScheduler"
    assert settings["scheduler"]["overrides"]["use_karras_sigmas"] is True
    assert json.loads(json.dumps(settings)) == settings


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_results_are_complete(results: Results) -> None:
    assert set(results.stages) == set(STAGES)
    assert results.device == "cpu" and results.gpu_memory is None
    assert results.stages["unet"].count == 3 * 3  # PNDM visits one timestep twice
    assert results.first_image > 0 and results.load > 0 and results.memory > 50
    (cold,) = results.cold
    assert cold.seconds > results.stages["picture"].p50 and cold.megabytes > 50
    assert [point.offered for point in results.loads] == [30, 60]
    assert [batch.images for batch in results.batches] == [1, 2]


def test_table_and_json(results: Results) -> None:
    both = replace(
        results,
        peer=(Compared("picture", "s", 0.1, 0.25), Compared("peak memory", "MB", 130.0, 520.0)),
        peer_libraries={"diffusers": "0.42"},
        likeness=86.04,
    )
    text = report.table(both)
    assert all(meaning in text for meaning in report.MEANINGS.values())
    assert "against diffusers 0.42; pictures agree to 86.0 dB" in text and "    2.50" in text and "4.00" in text
    assert max(map(len, text.splitlines()[2:])) <= 100
    values = json.loads(json.dumps(report.to_json(both)))
    assert values["peer"][0] == {"name": "picture", "unit": "s", "ours": 0.1, "peer": 0.25, "ratio": 2.5}
    assert values["stages"]["unet"]["count"] == 9 and values["schema_version"] == 1


def test_plot_is_svg(results: Results) -> None:
    root = ElementTree.fromstring(report.plot(replace(results, peer=(Compared("picture", "s", 0.1, 0.25),))))
    text = "".join(root.itertext())
    assert all(title in text for title in ("Stages", "Images a second", "Latency", "Times better than diffusers"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(83.4e-6, "83.4 µs"), (4.213e-3, "4.21 ms"), (0.35, "350 ms"), (12.34, "12.3 s"), (4321, "4321 s")],
)
def test_seconds_for_people(value: float, text: str) -> None:
    assert report.seconds(value) == text


def test_new_processes_are_sd_run_s(bundle: Bundle, request_: Request, tmp_path: Path) -> None:
    command = cold_command(bundle, Plan(replace(request_, scheduler="euler"), "cpu"), tmp_path / "x.png")
    run(command)
    assert (tmp_path / "x.png").stat().st_size > 0


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    size = ["--width", "64", "--height", "64", "--steps", "2", "--device", "cpu"]
    few = ["--rounds", "1", "--warmup", "0", "--cold", "0", "--batches", "1"]
    assert main([str(demo_bundle), *size, *few, "--json", str(values), "--plot", str(plot)]) == 0
    assert "steps/s" in capsys.readouterr().out
    assert json.loads(values.read_text())["plan"]["rounds"] == 1
    assert plot.read_text().startswith("<svg ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "rounds: got 0 rounds"),
        (["--batches", "1,x"], "batches: got 1,x, accepted numbers such as 1,2,4"),
        (["--batches", "0"], "batches: got"),
        (["--requests-per-second", "0"], "requests-per-second and duration"),
        (["--plot", "bench.png"], "plot: got bench.png, accepted a name that ends in .svg"),
        (["--json", "no/such/folder/x.json"], "No such file or directory; create the folder first"),
        (["--json", "."], "Is a directory; choose the name of a file"),
        (["--plot", "x" * 300 + ".svg"], "File name too long; choose a shorter name"),
        (["--steps", "0"], "--steps: got 0"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be(
    demo_bundle: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(demo_bundle), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_report_takes_the_last_one_s_place_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, link = tmp_path / "bench.json", tmp_path / "latest.json"
    link.symlink_to(report)
    for text in ("first", "second ×"):
        check_report(link)
        write_report(link, text)
        assert link.is_symlink() and report.read_text("utf-8") == text

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SDError, match="No space left on device; free space on that disk"):
        write_report(report, "third")
    assert report.read_text("utf-8") == "second ×"
    assert sorted(tmp_path.iterdir()) == [report, link]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_report_to_a_device_leaves_the_device() -> None:
    check_report(Path("/dev/full"))
    with pytest.raises(SDError, match="cannot write '/dev/full': No space left on device"):
        write_report(Path("/dev/full"), "text")
    write_report(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device() and Path("/dev/full").is_char_device()


def test_help_imports_nothing_heavy() -> None:
    loaded = modules_after(HELP.format(module="sd_runtime.bench.cli", arguments=["--help"]))
    assert not {"numpy", "PIL", "onnxruntime", "torch"} & loaded


# ---- the baseline ----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(results: Results, tmp_path: Path) -> Path:
    """What sd-bench wrote of a run beside diffusers."""
    peer = (Compared("picture", "s", 0.1, 0.2), Compared("cold start", "s", 0.5, 5.0))
    document = report.to_json(replace(results, peer=peer, peer_libraries={"diffusers": "0.42"}))
    (tmp_path / "results.json").write_text(json.dumps(document))
    return tmp_path / "results.json"


def test_baseline_reports_and_never_fails(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = measured.with_name("baseline.json")
    assert check_baseline([str(path), "--results", str(measured), "--update"]) == 0
    assert json.loads(path.read_text())["ratios"] == {"picture": 2.0, "cold start": 10.0}
    before = json.loads(path.read_text())
    before["ratios"] = {"picture": 2.9, "cold start": 9.5, "step": 3.0}
    before["machine"]["cpu"] = "another"
    path.write_text(json.dumps(before))
    capsys.readouterr()
    assert check_baseline([str(path), "--results", str(measured)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[1:4]] == ["worse", "as before", "not measured"]
    assert lines[-1].startswith("measured on something else: cpu another → ")


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        (2.0, 2.1, "as before"),
        (2.0, 1.5, "worse"),
        (2.0, 2.6, "better"),
        (None, 1.0, "new"),
        (1.0, None, "not measured"),
    ],
)
def test_what_noise_explains_is_no_change(before: float | None, now: float | None, verdict: str) -> None:
    assert Change("picture", before, now).verdict == verdict


def test_baseline_of_nothing(results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(report.to_json(results)))
    for arguments in (["--results", str(alone)], [], ["--results", str(tmp_path / "no.json")]):
        assert check_baseline([str(tmp_path / "baseline.json"), *arguments]) == 2
    assert "measure with sd-bench --against diffusers" in capsys.readouterr().err


def test_the_committed_baseline_can_be_read() -> None:
    document = json.loads((Path(__file__).parents[2] / "benchmarks/baseline.json").read_text())
    baseline = from_json(Baseline, document)
    assert baseline.ratios.keys() == {"cold start", "peak memory", "picture", "step"}


# ---- on a GPU, a fake one --------------------------------------------------------------------------------------------


def test_where_tensorrt_runs_the_loop_only_its_whole_is_known(
    demo_bundle: Path, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the text encoder nor the UNet is timed alone, and the loop stays on the GPU."""
    gpu = FakeGpu().install(monkeypatch)
    FakeTensorRT(gpu, VERSION).install(monkeypatch)
    pipeline, calls = open_timed(Bundle.open(copy_with_engines(demo_bundle, tmp_path / "bundle")), "auto")
    with pipeline:
        times = time_picture(pipeline, calls, request_)
        assert isinstance(pipeline.loops.denoiser(Guidance(4.0)), DeviceDenoiser)
        assert not pipeline.engines.on_cpu and pipeline.engines.precision("unet") == "fp32"
    assert times["tokenize"] == times["host"] == []
    assert len(times["unet"]) == len(times["text"]) == 1
    assert sum(times["unet"]) < sum(times["picture"])
