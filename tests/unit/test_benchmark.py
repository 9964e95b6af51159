"""scripts/benchmark.py: the diffusers side, the table with its targets, and the baseline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import benchmark
import pytest
from benchmark import Comparison, find_checkpoint, peer_settings, warm_peer
from benchmark_baseline import Baseline, Change, read_baseline
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import Source
from sd_runtime.errors import BundleError, SDError
from sd_runtime.request import Request, make_request

SMALL = ["--steps", "2", "--width", "64", "--height", "64", "--cold", "1", "--rounds", "1"]


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def request_(bundle: Bundle) -> Request:
    return make_request(bundle.manifest.defaults, "a red star", seed=3, num_inference_steps=2, height=64, width=64)


def test_both_sides_draw_the_same(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole program: what it measures, writes and compares; a target cannot be missed where there is a baseline."""
    values, plot, baseline, new = (tmp_path / name for name in ("v.json", "v.svg", "before.json", "after.json"))
    before = Baseline({"cpu": "another"}, {}, {"cold start": 1e6, "peak memory": 1e-6, "gone": 2.0})
    baseline.write_text(json.dumps(vars(before)))
    files = ["--json", values, "--plot", plot, "--baseline", baseline, "--write-baseline", new]
    scheduler = ["--scheduler", "euler", "--negative-prompt", "blue"]
    assert benchmark.main([str(demo_bundle), *SMALL, *scheduler, *map(str, files)]) == 0
    document = json.loads(values.read_text())
    assert document["psnr_db"] is None or document["psnr_db"] > 60
    names = ["cold start", "peak memory", "picture", "step"]
    assert [row["name"] for row in document["comparisons"]] == names
    assert all(len(row["ours"]) == len(row["diffusers"]) == 1 for row in document["comparisons"])
    assert [row["target"] for row in document["comparisons"]] == [10, 4, 2, None]
    picture, step = document["comparisons"][2:]
    assert picture["diffusers"][0] > step["diffusers"][0] > 0 and picture["ours"][0] > step["ours"][0] > 0
    assert list(read_baseline(new).ratios) == names and read_baseline(new).libraries["diffusers"]
    assert plot.read_text().startswith("<svg ")
    lines = capsys.readouterr().out.splitlines()
    found = {line[:14].strip(): line.split("  ")[-1].strip() for line in lines[lines.index("") :][8:]}
    assert found["cold start"] == "worse" and found["peak memory"] == "better"
    assert found["gone"] == "not measured" and found["step"] == "new"
    assert lines[-1].startswith("the baseline was measured on something else: cpu another → ")


def test_a_missed_target_fails(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Comparison("picture", "s", (0.1, 0.3, 0.2), (0.3, 0.1, 0.2), 2.0),
        Comparison("step", "s", (2,), (1,), None),
    ]
    monkeypatch.setattr(benchmark, "compare", lambda *_: (found, 95.04))
    assert benchmark.main([str(demo_bundle)]) == 1
    out, err = capsys.readouterr()
    assert "the pictures agree to 95.0 dB (PSNR)" in out
    picture, step = (line.split() for line in out.splitlines()[-2:])
    assert picture == ["picture", "200", "ms", "200", "ms", "1.00", "2", "3", "missed"]
    assert step == ["step", "2", "s", "1", "s", "0.50", "1"]
    assert err == "benchmark.py: a target was missed: picture 1.00, target 2\n"
    found[0] = replace(found[0], target=1.0)
    assert benchmark.main([str(demo_bundle), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_targets_are_the_demo_model_s(bundle: Bundle, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(bundle, manifest=replace(bundle.manifest, source=Source("a-folder", None, {})))
    samples = {"peak memory": ([1.0], [2.0])}
    monkeypatch.setattr(benchmark, "measure_cold", lambda *_: samples)
    monkeypatch.setattr(benchmark, "measure_warm", lambda *_: {})
    monkeypatch.setattr(benchmark, "compare_pictures", lambda *_: None)
    args = benchmark.build_parser().parse_args(["--quiet"])
    for which, target in ((bundle, 4.0), (other, None)):
        settings = peer_settings(request_, "x", which.manifest, "cpu")
        assert benchmark.compare(which, request_, settings, args) == (
            [Comparison("peak memory", "MB", [1.0], [2.0], target)],
            None,
        )


# ---- diffusers' process ----------------------------------------------------------------------------------------------


def test_a_peer_that_cannot_start(bundle: Bundle, request_: Request) -> None:
    settings = peer_settings(request_, "/no/such/model", bundle.manifest, "cpu")
    with warm_peer(settings) as draw, pytest.raises(SDError, match="ended before it had drawn"):
        draw("a red star", 1)


def test_where_the_checkpoint_is(bundle: Bundle) -> None:
    manifest = bundle.manifest
    model, revision = find_checkpoint(manifest)
    assert Path(model, "model_index.json").is_file() and revision is None
    assert find_checkpoint(replace(manifest, source=Source("owner/name", "c0ffee", {}))) == ("owner/name", "c0ffee")
    with pytest.raises(BundleError, match="name it with `checkpoint`"):
        find_checkpoint(replace(manifest, source=Source("a-folder", None, {})))


def test_settings_are_diffusers_words(bundle: Bundle, request_: Request) -> None:
    settings = peer_settings(replace(request_, scheduler="dpmpp_2m_karras"), "x", bundle.manifest, "cpu")
    assert settings["model"] == "x" and settings["revision"] is None
    assert settings["scheduler"]["class_name"] == "DPMSolverMultistepScheduler"
    assert settings["scheduler"]["overrides"]["use_karras_sigmas"] is True
    assert json.loads(json.dumps(settings)) == settings


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: got 0, accepted 1 or more"),
        (["--cold", "0"], "--cold: got 0, accepted 1 or more"),
        (["--plot", "bench.png"], "--plot: got bench.png, accepted a name that ends in .svg"),
        (["--write-baseline", "."], "Is a directory; choose the name of a file"),
        (["--baseline", "no.json"], "cannot read no.json (No such file or directory); make one with --write-baseline"),
        (["--scheduler", "er_sde"], "scheduler: diffusers has no ER SDE, so there is no reference to compare with"),
        (["--steps", "0"], "--steps: got 0"),
        (["--nonsense"], "unrecognized arguments: --nonsense; see benchmark.py --help"),
    ],
)
def test_what_cannot_be(
    demo_bundle: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([str(demo_bundle), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_without_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "DEMO_BUNDLE", tmp_path / "none")
    assert benchmark.main([]) == 1
    assert "the demo model is not exported yet; run scripts/demo, or name a bundle" in capsys.readouterr().err


# ---- the baseline ----------------------------------------------------------------------------------------------------


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


def test_the_committed_baseline_can_be_read() -> None:
    baseline = read_baseline(Path(__file__).parents[2] / "benchmarks/baseline.json")
    assert baseline.ratios.keys() == {"cold start", "peak memory", "picture", "step"}
