"""sd-bench: percentiles, the clock of each stage, open load, new processes, and what is written."""

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
from sd_runtime.bench import load, report
from sd_runtime.bench.benchmark import Benchmark, Results, measure
from sd_runtime.bench.cli import main
from sd_runtime.bench.distribution import Distribution
from sd_runtime.bench.load import due_times, measure_load
from sd_runtime.bench.machine import describe_machine, physical_cores
from sd_runtime.bench.processes import GpuMemory, cold_command, run
from sd_runtime.bench.stage_times import STAGES, measure_batches, open_timed, time_picture, varied
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.cli.report_files import check_report, write_report
from sd_runtime.errors import SDError, UsageError
from sd_runtime.images.metadata import read_parameters
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
    """All measurements, few of each."""
    few = {"rounds": 3, "warmup": 1, "cold": 1, "batches": (1, 2)}
    rates = {"rates": (30.0, 60.0), "duration": 0.2, "arrivals": "fixed"}
    return measure(bundle, Benchmark(request_, "cpu", ("onnxruntime",), **few, **rates))


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
    """The module `time` with a clock that only the work and the waiting move."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(load, "time", clock)
    return clock


def serve_with(clock: Clock, seconds: list[float]) -> Any:
    def serve(number: int) -> None:
        clock.now += seconds[number]

    return serve


def test_latency_counts_from_when_a_request_was_due(clock: Clock) -> None:
    """One slow answer makes the next requests late although each is served quickly: 3, 2.1, 1.2 and 0.3 seconds."""
    point = measure_load([0, 1, 2, 3], 1.0, serve_with(clock, [3, 0.1, 0.1, 0.1]))
    assert point.latency.p50 == pytest.approx(1.2)
    assert point.latency.p99 == pytest.approx(3)
    assert point.latency.mean == pytest.approx((3 + 2.1 + 1.2 + 0.3) / 4)
    assert point.busy == pytest.approx(1) and point.unserved == 0
    assert clock.slept == []


def test_nothing_is_served_before_it_is_due(clock: Clock) -> None:
    point = measure_load([0.5, 2.0], 1.0, serve_with(clock, [0.25, 0.25]))
    assert clock.slept == pytest.approx([0.5, 1.25])
    assert point.latency.p99 == pytest.approx(0.25)
    assert point.busy == pytest.approx(0.5 / 2.25)


def test_a_load_that_cannot_be_served_is_given_up(clock: Clock) -> None:
    due = [i / 10 for i in range(100)]
    point = measure_load(due, 10.0, serve_with(clock, [5.0] * 100))
    assert 0 < point.unserved == 100 - round(point.served * (clock.now - 100))
    assert point.latency.p50 > 10


def test_due_times() -> None:
    assert due_times(4, 1, "fixed") == [0, 0.25, 0.5, 0.75]
    poisson = due_times(50, 100, "poisson")
    assert poisson == due_times(50, 100, "poisson")
    assert poisson == sorted(poisson) and poisson[0] > 0 and poisson[-1] < 100
    assert len(poisson) == pytest.approx(5000, rel=0.05)
    gaps = [b - a for a, b in pairwise(poisson)]
    assert Distribution.of(gaps).p50 == pytest.approx(math.log(2) / 50, rel=0.1)  # of an exponential distribution
    assert due_times(0.001, 1, "fixed") == due_times(0.001, 1, "poisson") == [0]


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
    lines = report.table(results).splitlines()
    labels = [line[:30].strip() for line in lines]
    assert set(report.MEANINGS.values()) <= set(labels)
    assert {"loading the networks", "pictures a second, batch of 2", "start to picture on disk"} <= set(labels)
    assert max(map(len, lines[2:])) <= 100
    values = json.loads(json.dumps(report.to_json(results)))
    assert values["stages"]["unet"]["count"] == 9 and values["schema_version"] == 2
    assert values["benchmark"]["backends"] == ["onnxruntime"]


def test_table_of_a_gpu(results: Results) -> None:
    (cold,) = results.cold
    gpu = replace(results, device="cuda", gpu_memory=2345.0, cold=(replace(cold, gpu_megabytes=1234.0),), loads=())
    table = report.table(gpu)
    assert f"{results.bundle} on the GPU" in table
    assert "MB, of the GPU 2345 MB" in table and "MB, of the GPU 1234 MB" in table


def test_plot_is_svg(results: Results) -> None:
    root = ElementTree.fromstring(report.plot(results))
    text = "".join(root.itertext())
    assert all(title in text for title in ("Seconds of each stage", "Pictures a second", "Latency"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(83.4e-6, "83.4 µs"), (4.213e-3, "4.21 ms"), (0.35, "350 ms"), (12.34, "12.3 s"), (4321, "4321 s")],
)
def test_seconds_for_people(value: float, text: str) -> None:
    assert report.seconds(value) == text


def test_new_processes_are_sd_run_s(bundle: Bundle, request_: Request, tmp_path: Path) -> None:
    """With all that the request says, a prompt and a negative prompt that look like flags included."""
    request = replace(request_, scheduler="euler", prompts=("-q",), negative_prompts=("-x",))
    run(cold_command(bundle.root, request, tmp_path / "x.png", "cpu", ["onnxruntime"]))
    told = read_parameters(tmp_path / "x.png")
    assert (told.prompt, told.negative_prompt, told.seed) == ("-q", "-x", 3)
    assert (told.num_inference_steps, told.width, told.height, told.scheduler) == (2, 64, 64, "Euler")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    size = ["--width", "64", "--height", "64", "--steps", "2", "--device", "cpu"]
    few = ["--rounds", "1", "--warmup", "0", "--cold", "0", "--batches", "1"]
    assert main([str(demo_bundle), *size, *few, "--json", str(values), "--plot", str(plot)]) == 0
    assert "steps a second" in capsys.readouterr().out
    assert json.loads(values.read_text())["benchmark"]["rounds"] == 1
    assert plot.read_text().startswith("<svg ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: got 0, accepted 1 or more"),
        (["--warmup", "-1"], "--warmup: got -1, accepted 0 or more"),
        (["--cold", "-1"], "--cold: got -1, accepted 0 or more"),
        (["--batches", "1,x"], "--batches: got 1,x, accepted numbers such as 1,2,4"),
        (["--batches", "1,0"], "--batches: got 1, 0, accepted sizes from 1"),
        (["--requests-per-second", "0"], "--requests-per-second: got 0, accepted numbers above 0, to 10000"),
        (["--duration", "0"], "--duration: got 0.0, accepted seconds above 0, to 100000"),
        (["--backend", "x", "--cold", "0"], "--backend: got x, accepted"),
        (["--plot", "bench.png"], "--plot: got bench.png, accepted a name that ends in .svg"),
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
