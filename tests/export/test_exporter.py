"""export(): what a bundle holds, when one is left as it is, replaced or refused, and that its bytes repeat."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from sd_export import exporter as stages
from sd_export.exporter import export
from sd_export.networks.registry import REQUIRED
from sd_export.options import ExportOptions
from sd_export.progress import Progress
from sd_export.source import Checkpoint
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, Defaults, record_file
from sd_runtime.errors import DependencyError, ExportError, UsageError

SMALLEST = ("text_encoder",)


@pytest.fixture(scope="session")
def small_bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One component only: a second to export."""
    return export(
        ExportOptions(str(tiny_folder), output=tmp_path_factory.mktemp("bundles") / "small", components=SMALLEST)
    )


@pytest.fixture
def small_copy(small_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "small"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bundle_holds_what_runtime_and_optimum_open(tiny_bundle: Path) -> None:
    files = contents(tiny_bundle)
    assert files.keys() >= {
        "manifest.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "text_encoder/model_embeds.onnx",
        *(f"{name}/{file}" for name in REQUIRED for file in ("config.json", "model.onnx", "model.safetensors")),
    }
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert json.loads(files["vae_encoder/config.json"])["scaling_factor"] == 0.18215


def test_manifest_lists_every_file(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.files == {
        path.relative_to(tiny_bundle).as_posix(): record_file(path)
        for path in tiny_bundle.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, "README.md")  # the model card, which people edit
    }
    assert manifest.name == manifest.source.id == "tiny-model"
    assert (manifest.latent.channels, manifest.latent.pixels, manifest.latent.scaling_factor) == (4, 8, 0.18215)
    assert manifest.defaults == Defaults(num_inference_steps=50, guidance_scale=7.5, height=128, width=128)
    assert set(manifest.components["text_encoder"].graphs) >= {"plain", "embeds"}
    assert all(manifest.exporter[name][0].isdigit() for name in ("torch", "diffusers", "transformers", "onnx"))


def test_engine_edges_are_the_manifest_s(tiny_bundle: Path) -> None:
    """Names, types and varying axes that ONNX Runtime reports are the ones declared."""
    for component in Bundle.open(tiny_bundle).manifest.components.values():
        plain = component.graph()
        session = onnxruntime.InferenceSession(str(tiny_bundle / plain.path), providers=["CPUExecutionProvider"])
        for found, declared in ((session.get_inputs(), plain.inputs), (session.get_outputs(), plain.outputs)):
            assert [tensor.name for tensor in found] == [spec.name for spec in declared]
            assert [len(tensor.shape) for tensor in found] == [len(spec.shape) for spec in declared]


def test_the_same_checkpoint_gives_the_same_bytes(tiny_bundle: Path, tiny_copy: Path, tmp_path: Path) -> None:
    """In another process, with other hashes, from another place, to another place."""
    again = tmp_path / "again"
    code = "import sys; from sd_export.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--model", str(tiny_copy), "--output", str(again), "--quiet"]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{again}\n"
    first, second = contents(tiny_bundle), contents(again)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_half_precision(tiny_folder: Path, small_bundle: Path, tmp_path: Path) -> None:
    half = export(ExportOptions(str(tiny_folder), output=tmp_path / "half", precision="fp16", components=SMALLEST))
    assert Bundle.open(half).manifest.precision == "fp16"
    weights = "text_encoder/model.safetensors"
    assert (half / weights).stat().st_size < 0.75 * (small_bundle / weights).stat().st_size


def test_components(small_bundle: Path) -> None:
    manifest = Bundle.open(small_bundle).manifest
    assert set(manifest.components) == {"text_encoder"}
    assert not (small_bundle / "unet").exists()


def test_an_up_to_date_bundle_is_left_alone(
    tiny_folder: Path, small_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = small_copy.stat().st_ino
    assert export(ExportOptions(str(tiny_folder), output=small_copy, components=SMALLEST)) == small_copy
    assert small_copy.stat().st_ino == before
    assert capsys.readouterr().err == f"{small_copy} is up to date\n"


def test_force_replaces_a_damaged_bundle(tiny_folder: Path, small_copy: Path) -> None:
    config = small_copy / "scheduler" / "scheduler_config.json"
    good = config.read_bytes()
    config.write_bytes(bytes([good[0] ^ 1]) + good[1:])  # one bit, which only the digest shows
    export(ExportOptions(str(tiny_folder), output=small_copy, components=SMALLEST, force=True))
    assert config.read_bytes() == good


@pytest.mark.parametrize("difference", ["precision", "components", "damage"])
def test_another_bundle_is_not_replaced_unasked(tiny_folder: Path, small_copy: Path, difference: str) -> None:
    if difference == "damage":
        (small_copy / "text_encoder" / "model.onnx").write_bytes(b"")
    options = ExportOptions(
        str(tiny_folder),
        output=small_copy,
        precision="fp16" if difference == "precision" else "fp32",
        components=("vae_decoder",) if difference == "components" else SMALLEST,
    )
    with pytest.raises(ExportError, match=r"exists: got a fp32 bundle of tiny-model; replace it with --force"):
        export(options)
    assert (small_copy / MANIFEST).exists()


def test_what_is_not_a_bundle_is_never_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("documents", "file"):
        with pytest.raises(ExportError, match="exists and is not a bundle"):
            export(ExportOptions(str(tiny_folder), output=tmp_path / name, components=SMALLEST, force=True))
    assert (tmp_path / "documents" / "thesis.tex").read_text() == "years of work"


def test_a_failing_export_leaves_nothing(
    tiny_folder: Path, small_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(names: object, request: object, checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
        (folder / "half").write_text("")
        raise ZeroDivisionError

    monkeypatch.setattr(stages, "_export_components", fail)
    before = contents(small_copy)
    for target in (small_copy, tmp_path / "fresh"):
        with pytest.raises(ZeroDivisionError):
            export(ExportOptions(str(tiny_folder), output=target, precision="fp16", components=SMALLEST, force=True))
    assert contents(small_copy) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fresh.lock", ".small.lock", "small"]


def test_default_place(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_LEAN_HOME", str(tmp_path))
    assert export(ExportOptions(str(tiny_folder), components=SMALLEST)) == tmp_path / "bundles" / "tiny-model"


def test_what_the_checkpoint_s_configs_say(tiny_copy: Path, tmp_path: Path) -> None:
    """Recommended settings are taken over, paths of another machine are not."""
    settings = {"num_inference_steps": 25, "guidance_scale": 4, "height": 256, "width": 128}
    change(tiny_copy / "model_index.json", _defaults=settings)
    change(tiny_copy / "text_encoder" / "config.json", _name_or_path="/home/someone/clip")
    bundle = export(ExportOptions(str(tiny_copy), output=tmp_path / "bundle", components=SMALLEST))
    assert Bundle.open(bundle).manifest.defaults == Defaults(25, 4.0, 256, 128)
    assert "someone" not in (bundle / "text_encoder" / "config.json").read_text()


def change(config: Path, **fields: object) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


SETTINGS = {"num_inference_steps": 25, "guidance_scale": 4.0, "height": 128, "width": 128}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_defaults": {"steps": 3}}, "defaults: missing guidance_scale"),
        ({"_defaults": SETTINGS | {"num_inference_steps": 0}}, "num_inference_steps: got 0, accepted"),
        ({"_defaults": SETTINGS | {"num_inference_steps": 1000}}, "past training: got 1000"),
        ({"_defaults": SETTINGS | {"guidance_scale": -1}}, "guidance_scale: got -1.0, accepted"),
        ({"_defaults": SETTINGS | {"height": 130}}, "defaults.height: got 130, accepted multiples of 8 from 64 to"),
        ({"_defaults": SETTINGS | {"width": 4096}}, "defaults.width: got 4096, accepted multiples of 8 from 64 to"),
        ({"_preview": [[1, 2]]}, "_preview: got"),
    ],
)
def test_recommendations_that_cannot_be_are_refused_before_anything_is_traced(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, object], message: str
) -> None:
    change(tiny_copy / "model_index.json", **index)
    refused_untraced(tiny_copy, tmp_path, monkeypatch, message)


@pytest.mark.parametrize("factor", [None, "big", 0, True])
def test_a_scaling_factor_that_cannot_be(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: object
) -> None:
    change(tiny_copy / "vae" / "config.json", scaling_factor=factor)
    refused_untraced(tiny_copy, tmp_path, monkeypatch, f"scaling_factor: got {factor!r}, accepted a positive number")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("scheduler/scheduler_config.json", "{}", "PNDMScheduler: skip_prk_steps: accepted True"),
        ("tokenizer/tokenizer_config.json", "{}", "model_max_length: got none, accepted 77"),
    ],
)
def test_an_unusable_checkpoint_is_refused_before_anything_is_traced(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    (tiny_copy / name).write_text(text)
    refused_untraced(tiny_copy, tmp_path, monkeypatch, message)


def refused_untraced(checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """It is refused whether it would have been verified or not, with nothing made."""
    monkeypatch.setattr(stages, "_export_components", lambda *_: pytest.fail("traced"))
    for verify in (True, False):
        with pytest.raises(ExportError) as caught:
            export(ExportOptions(str(checkpoint), output=place / "out" / "bundle", components=SMALLEST, verify=verify))
        assert message in str(caught.value)
    assert not (place / "out").exists()


def test_missing_libraries(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LIBRARIES", ("json", "no_such_library"))
    with pytest.raises(DependencyError, match=r'sd-export needs no_such_library; pip install "sd-lean\[export\]"'):
        export(ExportOptions(str(tiny_folder), output=tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "model: got ''"),
        ({"precision": "int8"}, "precision: got int8, accepted fp32, fp16"),
        ({"components": ()}, "components: got '', accepted text_encoder,unet,vae_decoder,vae_encoder"),
        ({"components": ("unet", "vae")}, "components: got unet,vae, accepted"),
        ({"components": ("unet", "unet")}, "components named twice: got unet,unet"),
    ],
)
def test_requests_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        ExportOptions(**({"model": "demo"} | fields))  # type: ignore[arg-type]
    assert message.replace("'", "") in str(caught.value).replace("'", "")
