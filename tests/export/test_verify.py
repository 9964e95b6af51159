"""sd-verify: what is measured, what passes, that a damaged bundle is caught and where, and what is stored."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundle_with_engines import VERSION, copy_with_engines
from fake_cuda import FakeGpu
from fake_tensorrt import FakeTensorRT
from hypothesis import given
from hypothesis import strategies as st
from sd_export.networks.registry import REQUIRED
from sd_export.source import Checkpoint, resolve_checkpoint
from sd_export.verify import bisect as layers
from sd_export.verify.cli import main
from sd_export.verify.compare import compare, open_pipeline
from sd_export.verify.limits import CPU, EXACT, GPU, Limit, drift_limit, network_limit, picture_limit
from sd_export.verify.measures import Measure, measure
from sd_export.verify.probe import Probe, full_probe, sample_picture, short_probe
from sd_export.verify.reference import JSON, LATENTS, PICTURE, TENSORS, Reference
from sd_export.verify.report import Report, Row
from sd_export.verify.torch_reference import make_reference
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, EngineRecord, Manifest, record_file
from sd_runtime.bundle.safetensors_file import open_safetensors
from sd_runtime.errors import BundleError, ParityError
from sd_runtime.tensor import Array

STEPS = 3


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return resolve_checkpoint("demo")


@pytest.fixture(scope="module")
def probe(demo_bundle: Path) -> Probe:
    defaults = Bundle.open(demo_bundle).manifest.defaults
    return dataclasses.replace(short_probe(defaults, 1000, 8), num_inference_steps=STEPS, height=64, width=96)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint, probe: Probe) -> Reference:
    return make_reference(checkpoint, probe, REQUIRED, threads=1)


@pytest.fixture(scope="module")
def report(demo_bundle: Path, reference: Reference) -> Report:
    return verify(demo_bundle, reference)


def verify(bundle: Path, reference: Reference) -> Report:
    with open_pipeline(Bundle.open(bundle), "cpu") as pipeline:
        return compare(pipeline, reference)


Change = Callable[[Array], None]


@pytest.fixture
def damaged(demo_bundle: Path, tmp_path: Path) -> Callable[[str, str, Change], Path]:
    """damaged(component, tensor, change) → a bundle whose weights differ there, and whose digests say so: as if the
    export had gone wrong."""

    def get(component: str, tensor: str, change: Change) -> Path:
        bundle = copy(demo_bundle, tmp_path / "damaged")
        weights = bundle / component / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()  # the copy shares its files with the original
        weights.write_bytes(content)
        values = np.array(open_safetensors(weights)[tensor])
        change(values)
        with weights.open("r+b") as file:
            file.seek(offset_of(weights, tensor))
            file.write(values.tobytes())
        relist(bundle, f"{component}/model.safetensors")
        return bundle

    return get


def copy(bundle: Path, to: Path) -> Path:
    """Another bundle of the same files, without copying what is in them."""
    shutil.copytree(bundle, to)
    return to


def offset_of(weights: Path, tensor: str) -> int:
    """Where a tensor's bytes begin in the file."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin: int = json.loads(file.read(length))[tensor]["data_offsets"][0]
    return 8 + length + begin


def relist(bundle: Path, *names: str) -> None:
    """Write a manifest with the present digests of these files."""
    path = bundle / MANIFEST
    manifest = Manifest.from_bytes(path.read_bytes())
    path.unlink()
    files = manifest.files | {name: record_file(bundle / name) for name in names}
    path.write_bytes(dataclasses.replace(manifest, files=files).to_bytes())


@pytest.fixture
def stored(demo_bundle: Path, reference: Reference, tmp_path: Path) -> Path:
    """The demo bundle with this module's reference stored in it."""
    bundle = copy(demo_bundle, tmp_path / "stored")
    shutil.rmtree(bundle / "reference", ignore_errors=True)
    reference.save(bundle)
    relist(bundle, JSON, TENSORS)
    return bundle


# ---- measures and limits ---------------------------------------------------------------------------------------------


def test_measures_of_a_known_difference() -> None:
    reference = np.array([3.0, 0.0, 4.0], np.float32)
    got = measure(np.array([3.0, 0.5, 4.0], np.float32), reference)
    assert got.max_abs == 0.5
    assert got.relative == pytest.approx(0.1)  # 0.5 of a length of 5
    assert got.cosine == pytest.approx(5 / math.sqrt(25.25))
    assert got.psnr == pytest.approx(10 * math.log10(4**2 / (0.25 / 3)))
    assert measure(reference, reference, span=1.0) == Measure(0.0, 0.0, 1.0, math.inf)


@given(st.lists(st.integers(-1_000_000, 1_000_000), min_size=1, max_size=20), st.floats(0.5, 2))
def test_measures_do_not_depend_on_the_unit(values: list[int], unit: float) -> None:
    reference = np.array(values) + 1e3
    other = reference + np.linspace(1, 2, len(values))
    a, b = measure(other, reference), measure(other * unit, reference * unit)
    assert a.relative == pytest.approx(b.relative) and a.psnr == pytest.approx(b.psnr, abs=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_within_no_limit(broken: float) -> None:
    got = measure(np.array([1.0, broken]), np.array([1.0, 2.0]))
    assert not got.finite
    limits = (EXACT, Limit("relative", 1e9), Limit("psnr", -1e9), drift_limit("fp16"), picture_limit("fp16"))
    assert not any(limit.holds(got) for limit in limits)


def test_shapes_that_differ_are_no_match() -> None:
    assert not measure(np.zeros((1, 2)), np.zeros((2, 1))).finite


def test_limits() -> None:
    assert network_limit("unet", "fp32", 4096).value == CPU["fp32"].network
    assert network_limit("vae_encoder", "fp32", 16).value == CPU["fp32"].network
    assert network_limit("vae_decoder", "fp32", 4096).value == pytest.approx(8 * CPU["fp32"].network)
    assert network_limit("vae_decoder", "fp16", 4096).value == CPU["fp16"].network
    assert network_limit("vae_decoder", "fp32", 4096, on_cpu=False).value == GPU["fp32"].network
    assert drift_limit("bf16", on_cpu=False).value > drift_limit("fp16").value
    assert [str(limit) for limit in (EXACT, Limit("psnr", 60.0), Limit("relative", 1e-5))] == [
        "equal",
        "PSNR ≥ 60 dB",
        "relative ≤ 1.0e-05",
    ]


# ---- a sound bundle --------------------------------------------------------------------------------------------------


def test_a_sound_bundle_passes(report: Report) -> None:
    assert report.passed, report.table()
    assert list(dict.fromkeys(row.component for row in report.rows)) == [
        "tokenizer", "noise", "text_encoder", "unet", "vae_decoder", "vae_encoder", "loop", "picture",
    ]  # fmt: skip
    steps = [row for row in report.rows if row.component == "loop"]
    assert len(steps) == STEPS + 1  # PNDM visits one timestep twice
    assert report.pictures is not None and report.pictures[0].shape == (64, 96, 3)
    assert report.pictures[0].std() > 0.05
    report.raise_if_broken()


def test_the_reference_is_torch_s(reference: Reference, probe: Probe) -> None:
    """Three timesteps, the latents after each step, and the seconds that torch took."""
    assert [case.name for case in reference.cases if case.component == "unet"] == [
        f"timestep {t}" for t in (981, 501, 21)
    ]
    assert reference.tensors[LATENTS].shape == (STEPS + 1, 1, 4, 8, 12)
    assert reference.libraries.keys() == {"torch", "diffusers", "transformers"}
    assert {"text_encoder", "unet", "vae_decoder", "vae_encoder", "picture"} <= reference.seconds.keys()


def test_the_same_reference_twice(checkpoint: Checkpoint, probe: Probe, reference: Reference) -> None:
    again = make_reference(checkpoint, probe, REQUIRED, threads=1)
    assert again.tensors.keys() == reference.tensors.keys()
    assert all(np.array_equal(again.tensors[name], tensor) for name, tensor in reference.tensors.items())


def test_only_the_networks_that_there_are(checkpoint: Checkpoint, probe: Probe) -> None:
    alone = make_reference(checkpoint, probe, ["vae_encoder"], threads=1)
    assert {case.component for case in alone.cases} == {"vae_encoder"}
    assert PICTURE not in alone.tensors


def test_full_probe_is_what_the_authors_recommend(demo_bundle: Path) -> None:
    defaults = Bundle.open(demo_bundle).manifest.defaults
    full = full_probe(defaults, 1000)
    assert (full.num_inference_steps, full.width, full.guidance_scale) == (25, 128, 2.5)
    assert full.request(defaults).prompts == (full.prompt,)


def test_sample_picture_uses_its_whole_range() -> None:
    picture = sample_picture(64, 96)
    assert picture.shape == (1, 3, 64, 96) and picture.dtype == np.float32
    assert picture.min() == -1 and 0.5 < picture.max() <= 1


def test_engines_on_a_gpu_are_held_to_their_own_precision(
    demo_bundle: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's, faked, the UNet's in bfloat16: a float32 bundle is not expected to be as near then."""
    FakeTensorRT(FakeGpu().install(monkeypatch), VERSION).install(monkeypatch)

    def in_bfloat16(record: EngineRecord) -> EngineRecord:
        return dataclasses.replace(record, precision="bf16") if record.component == "unet" else record

    bundle = copy_with_engines(demo_bundle, tmp_path / "bundle", in_bfloat16)
    with open_pipeline(Bundle.open(bundle), "auto") as pipeline:
        report = compare(pipeline, reference)
    assert report.passed and report.device == "the GPU, its UNet in bf16"
    limits = {row.component: row.limit.value for row in report.rows}
    assert limits["unet"] == GPU["bf16"].network and limits["text_encoder"] == GPU["fp32"].network
    assert limits["loop"] == GPU["bf16"].drift and limits["picture"] == GPU["bf16"].picture


# ---- a damaged bundle ------------------------------------------------------------------------------------------------


def scale(values: Array) -> None:
    """Every other row only: what is scaled as a whole, a normalisation may bring back."""
    values[::2] *= 1.05


DAMAGE = {
    "text_encoder": ("text_model.encoder.layers.1.mlp.fc1.weight.T", "text_model.encoder.layers.1.mlp.fc1"),
    "unet": ("down_blocks.1.resnets.0.conv1.weight", "down_blocks.1.resnets.0.conv1"),
    "vae_decoder": ("decoder.up_blocks.1.resnets.0.conv2.weight", "decoder.up_blocks.1.resnets.0.conv2"),
    "vae_encoder": ("encoder.conv_in.weight", "encoder.conv_in"),
}


@pytest.mark.parametrize("component", DAMAGE)
def test_damage_is_found_and_placed(
    component: str, damaged: Callable[[str, str, Change], Path], reference: Reference, checkpoint: Checkpoint
) -> None:
    """Half of a layer's weights off by 5 %: its network breaks its limit first, and bisecting names the layer."""
    tensor, layer = DAMAGE[component]
    bundle = damaged(component, tensor, scale)
    report = verify(bundle, reference)
    first = report.broken[0]
    assert first.component == component
    case = next(case for case in reference.cases if (case.component, case.name) == (first.component, first.name))
    drift = layers.bisect(Bundle.open(bundle), checkpoint, reference, case, first)
    assert drift.starts == layer
    with pytest.raises(ParityError, match=rf"{component}, .*, from layer {layer} differs from the reference"):
        dataclasses.replace(report, drift=drift).raise_if_broken()


def test_a_layer_that_yields_nan(
    damaged: Callable[[str, str, Change], Path], reference: Reference, checkpoint: Checkpoint
) -> None:
    bundle = damaged("unet", "conv_out.weight", lambda values: values.fill(np.nan))
    with open_pipeline(Bundle.open(bundle), "cpu") as pipeline:
        case = next(case for case in reference.cases if case.component == "unet")
        output = pipeline.engines.engine("unet").run(reference.feeds(case))[case.output]
    row = Row("unet", case.name, measure(output, reference.tensors[case.expected]), Limit("relative", 1e-5))
    assert not row.passed
    assert layers.bisect(Bundle.open(bundle), checkpoint, reference, case, row).starts == "conv_out"


def test_nan_is_reported_not_raised(
    damaged: Callable[[str, str, Change], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop ends where the pipeline refuses NaN; the report has what came before, and the layer."""
    bundle = damaged("unet", "conv_out.weight", lambda values: values.fill(np.nan))
    assert main([str(bundle), "--width", "64", "--height", "64", "--steps", "2", "--bisect", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "loop, UNet output in step 1 of 3 (timestep 501)" in captured.out
    assert "vae_decoder, sample picture" in captured.out
    assert "unet, timestep 981, from layer conv_out differs from the reference" in captured.err
    assert "got NaN or infinity" in captured.err


def test_layers_of_a_sound_network(
    demo_bundle: Path, reference: Reference, checkpoint: Checkpoint, report: Report
) -> None:
    case = next(case for case in reference.cases if case.component == "unet")
    row = next(row for row in report.rows if row.component == "unet")
    drift = layers.bisect(Bundle.open(demo_bundle), checkpoint, reference, case, row)
    assert drift.starts is None and "none of" in str(drift)
    assert len(drift.layers) > 200 and drift.layers[-1].layer == "conv_out"
    assert max(layer.error for layer in drift.layers) < CPU["fp32"].network


# ---- stored tensors --------------------------------------------------------------------------------------------------


def test_stored_tensors_are_the_reference(stored: Path, reference: Reference, report: Report) -> None:
    loaded = Reference.load(Bundle.open(stored))
    assert (loaded.probe, loaded.cases, loaded.texts) == (reference.probe, reference.cases, reference.texts)
    assert all(np.array_equal(loaded.tensors[name], tensor) for name, tensor in reference.tensors.items())
    assert verify(stored, loaded).rows == report.rows


def test_stored_tensors_are_small(demo_bundle: Path, checkpoint: Checkpoint) -> None:
    """Below 3 MB for Stable Diffusion 1.5, whose hidden states are 768 wide where the demo's are 64."""
    short = short_probe(Bundle.open(demo_bundle).manifest.defaults, 1000, 8)
    reference = make_reference(checkpoint, short, REQUIRED, threads=1)
    width = reference.tensors["last_hidden_state"].shape[-1]
    assert width == 64
    grown = {name: 768 / width if tensor.shape[-1] == width else 1 for name, tensor in reference.tensors.items()}
    assert sum(tensor.nbytes * grown[name] for name, tensor in reference.tensors.items()) < 3e6


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_damaged_tensors_are_refused(stored: Path, name: str) -> None:
    content = (stored / name).read_bytes()
    (stored / name).write_bytes(content[:-9] + b"x" + content[-8:])
    with pytest.raises(BundleError, match="is damaged"):
        Reference.load(Bundle.open(stored))


def test_a_bundle_without_stored_tensors(stored: Path) -> None:
    manifest = Manifest.from_bytes((stored / MANIFEST).read_bytes())
    files = {name: record for name, record in manifest.files.items() if not name.startswith("reference/")}
    (stored / MANIFEST).write_bytes(dataclasses.replace(manifest, files=files).to_bytes())
    with pytest.raises(BundleError, match="holds no reference tensors; name the checkpoint with --against MODEL"):
        Reference.load(Bundle.open(stored))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command_names_component_and_layer(
    damaged: Callable[[str, str, Change], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source is the demo, so the reference is computed without being asked for."""
    bundle = damaged("unet", DAMAGE["unet"][0], scale)
    page, values = tmp_path / "report.html", tmp_path / "report.json"
    size = ["--width", "64", "--height", "64", "--steps", "2", "--scheduler", "euler"]
    code = main([str(bundle), *size, "--bisect", "--html", str(page), "--json", str(values), "--device", "cpu"])
    captured = capsys.readouterr()
    assert code == 1
    assert "unet, timestep 981, from layer down_blocks.1.resnets.0.conv1 differs from the reference" in captured.err
    assert "BROKEN" in captured.out and "the drift starts at down_blocks.1.resnets.0.conv1" in captured.out
    found = json.loads(values.read_text())
    assert found["passed"] is False and found["drift"]["starts"] == "down_blocks.1.resnets.0.conv1"
    assert found["probe"]["scheduler"] == "euler"
    assert page.read_text().startswith("<!doctype html>")


def test_command_with_stored_tensors_imports_no_torch(stored: Path, tmp_path: Path) -> None:
    program = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "onnx", "safetensors"):
            raise AssertionError(name + " was imported")

sys.meta_path.insert(0, Refuse())
from sd_export.verify.cli import main
sys.exit(main([{str(stored)!r}, "--against", "stored", "--device", "cpu", "--html", {str(tmp_path / "r.html")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tensors that the export stored in the bundle" in done.stdout
    assert "are within their limits." in done.stdout


def test_another_model_is_noted_and_does_not_fit(
    demo_bundle: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(demo_bundle), "--against", str(tiny_folder), "--width", "64", "--height", "64", "--steps", "4"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "is not what the bundle was made from: " in captured.err
    assert "input 'encoder_hidden_states': got float32(2, 77, 24), accepted float32" in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--against", "stored", "--steps", "3"],
            2,
            "stored reference tensors are for one picture: num_inference_steps",
        ),
        (["--against", "stored", "--bisect"], 1, "--bisect needs the checkpoint; name it with --against MODEL"),
        (["--against", "no/such\0model"], 2, "model: got"),
        (["--width", "65"], 2, "width: got 65, accepted multiples of 8"),
        (["--html", "no/such/folder/report.html"], 2, "No such file or directory; create the folder first"),
        (["--json", "."], 2, "Is a directory; choose the name of a file"),
        (["--against", "stored", "--html", "/dev/full"], 1, "cannot write '/dev/full': No space left on device"),
        (["--nonsense"], 2, "unrecognized arguments"),
    ],
)
def test_what_cannot_be(
    stored: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(stored), *arguments]) == code
    assert message in capsys.readouterr().err
