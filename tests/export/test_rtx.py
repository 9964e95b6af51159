"""Engines of TensorRT for RTX, really built: the library needs no GPU for it, and its log says what it made."""

from __future__ import annotations

import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from sd_export.cli import main
from sd_export.graphs.precision import to_float16
from sd_export.graphs.weights import save
from sd_export.tensorrt_.build import build
from sd_export.tensorrt_.failures import explain
from sd_export.tensorrt_.launches import FUSED_ATTENTION, Account, Launch, Tensor
from sd_export.tensorrt_.plan import BuildOptions, plan_builds
from sd_export.tensorrt_.portable import Portable, build_portable, check_structure, float32_products
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, Manifest, record_file
from sd_runtime.errors import ExportError, UsageError

VERSION = "1.7.1"  # any: nothing that is planned depends on it
SERVED = ("8.0", "8.6", "8.9", "12.0", "12.1")
ATTENTIONS = {"unet": 20, "text_encoder": 2}  # of the demo; the autoencoder's one is as wide as its channels


@pytest.fixture
def library() -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13", exc_type=ImportError)


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo_bundle, tmp_path / "demo")
    return tmp_path / "demo"


@pytest.fixture
def half_bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """The demo with its networks in float16, as `sd-export --precision fp16` writes the graphs that are built here."""
    from sd_export.graphs.forms import FORMS, rewrite
    from sd_export.graphs.weights import save_graph

    root = tmp_path / "half"
    shutil.copytree(demo_bundle, root)
    manifest = manifest_of(root)
    components, files = dict(manifest.components), dict(manifest.files)
    for name, component in manifest.components.items():
        if component.weights is None:
            continue
        plain, basic = component.graph("plain").path, component.graph("trt-basic").path
        model = ir.load(root / plain)
        to_float16(model)
        made = tmp_path / "networks"
        (made / name).mkdir(parents=True)
        save(model, made / plain, made / component.weights)  # apart: what it is made from is read while it is written
        for path in (plain, component.weights):
            (root / path).unlink()
            shutil.move(made / path, root / path)
        model = ir.load(root / plain)
        rewrite(model, FORMS["trt-basic"])
        (root / basic).unlink()
        save_graph(model, root / basic)
        kept = {form: component.graphs[form] for form in ("plain", "trt-basic")}
        components[name] = replace(component, graphs=kept)
        files |= {path: record_file(root / path) for path in (plain, basic, component.weights)}
    write(root, replace(manifest, precision="fp16", components=components, files=files))
    return root


def manifest_of(root: Path) -> Manifest:
    return Manifest.from_bytes((root / MANIFEST).read_bytes())


def write(root: Path, manifest: Manifest) -> None:
    (root / MANIFEST).write_bytes(manifest.to_bytes())


def only(root: Path, *components: str) -> None:
    manifest = manifest_of(root)
    write(root, replace(manifest, components={name: manifest.components[name] for name in components}))


def portable(root: Path = Path("bundle"), **fields: object) -> BuildOptions:
    return BuildOptions(root, library="tensorrt_rtx", **fields)  # type: ignore[arg-type]


def test_one_engine_of_the_unet_takes_any_number_of_rows(demo_bundle: Path) -> None:
    """And there is no dynamic one unless it is asked for, for it would carry the weights once more."""
    manifest = manifest_of(demo_bundle)
    builds = {planned.label: planned for planned in plan_builds(manifest, portable(batches=(1, 4)), VERSION)}
    assert list(builds) == [
        "unet 128x128",
        "vae_decoder 128x128 batch 1",
        "vae_encoder 128x128 batch 1",
        "text_encoder dynamic",
        "sampler_step guided",
        "sampler_step plain",
        "pixels plain",
    ]
    allowed = builds["unet 128x128"].profile["sample"]
    assert (allowed.min, allowed.opt, allowed.max) == ((1, 4, 16, 16), (2, 4, 16, 16), (8, 4, 16, 16))
    more = [planned.label for planned in plan_builds(manifest, portable(fallback=True), VERSION)]
    assert [label for label in more if "dynamic" in label and "text" not in label] == [
        "unet dynamic",
        "vae_decoder dynamic",
        "vae_encoder dynamic",
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"refittable": True}, "refittable: got TensorRT for RTX, which needs a GPU for it; leave it out, or build"),
        ({"library": "tensorrt", "turing": True}, "turing: got with TensorRT, accepted with TensorRT for RTX"),
        ({"library": "rtx"}, "library: got rtx, accepted tensorrt, tensorrt_rtx"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_built(fields: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        BuildOptions(Path("bundle"), **{"library": "tensorrt_rtx", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_turing_computes_in_float16_only(precision: str, demo_bundle: Path) -> None:
    said = rf"turing: got precision {precision}, accepted fp16; build without --turing, or export"
    with pytest.raises(UsageError, match=said):
        plan_builds(manifest_of(demo_bundle), portable(turing=True, precision=precision), VERSION)


def test_the_command_line_says_at_once_what_is_wrong(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    for arguments, code, said in (
        (["build", str(bundle), "--for", "rtx"], 1, 'pip install "sd-lean[tensorrt-rtx]"'),
        (["--model", "demo", "--tensorrt", "rtx"], 1, 'pip install "sd-lean[tensorrt-rtx]"'),
        (["build", str(bundle), "--for", "rtx", "--refittable"], 2, "refittable: got TensorRT for RTX"),
        (["build", str(bundle), "--turing"], 2, "turing: got with TensorRT"),
        (["--model", "demo", "--tensorrt", "rtx", "--turing"], 2, "turing: got precision fp32, accepted fp16"),
    ):
        assert main(arguments) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


@pytest.mark.usefixtures("library")
def test_a_bundle_gets_engines_without_a_gpu(half_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, for all RTX GPUs, with every attention fused and nothing slowly in float32; a second time, none."""
    build(portable(half_bundle, batches=(2,)), quiet=False)
    said = capsys.readouterr().err
    assert "for compute capability 8.0+; no GPU is needed" in said
    assert "float32" not in said and "not fused" not in said and "left out" not in said
    for name, count in ATTENTIONS.items():
        assert f"{count} attentions fused" in said.split(f"\n{name}")[1].split("\n")[1]
    opened = Bundle.open(half_bundle)
    records = opened.manifest.engines
    opened.verify(record.path for record in records)
    assert sorted({record.component for record in records}) == [
        "pixels",
        "sampler_step",
        "text_encoder",
        "unet",
        "vae_decoder",
        "vae_encoder",
    ]
    for record in records:
        assert (record.checked, record.target.library, record.target.compute_capability) == (
            "structure",
            "tensorrt_rtx",
            "8.0",
        )
        assert set(SERVED) <= set(record.target.serves) and not {"7.5", "9.0", "10.0"} & set(record.target.serves)
        assert record.path.startswith(f"engines/sm80-rtx{record.target.tensorrt}/")
        assert record.activation_memory > 0 or record.component == "pixels"
        assert (half_bundle / record.path).stat().st_size > 10_000
    build(portable(half_bundle, batches=(2,)))
    assert capsys.readouterr().err.count("is up to date") == len(records)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_and_dynamic_engines_are_built_too(
    precision: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No float32 attention is fused, and that is no remark; all of bfloat16's are, with fixed shapes and without."""
    build(portable(bundle, precision=precision, fallback=True), quiet=False)
    said = capsys.readouterr().err
    assert "left out" not in said and "not fused" not in said and "float32" not in said
    records = manifest_of(bundle).engines
    networks = [record for record in records if record.weights is not None]
    assert len(records) == 10 and {record.precision for record in networks} == {precision}
    for label, count in (("unet 128x128", 20), ("unet dynamic", 20), ("text_encoder dynamic", 2)):
        line = said.split(f"\n{label}")[1].split("\n")[1]
        assert (f"{count} attentions fused" in line) == (precision == "bf16") == ("fused" in line)


@pytest.mark.usefixtures("library")
def test_turing_gets_engines_of_its_own(half_bundle: Path) -> None:
    only(half_bundle, "text_encoder", "pixels")
    build(portable(half_bundle, turing=True))
    served = {
        (record.component, record.target.serves[0], len(record.target.serves) > 1, record.path.split("/")[1][:4])
        for record in manifest_of(half_bundle).engines
    }
    assert served == {
        (name, *rest) for name in ("text_encoder", "pixels") for rest in (("8.0", True, "sm80"), ("7.5", False, "sm75"))
    }


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("failing", ["vae_encoder", "unet"])
def test_one_failure_costs_one_engine(
    failing: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command fails only where there is none of the UNet, and then after the others were built."""

    def made(label: str, *_: object) -> Portable:
        if label.startswith(failing):
            raise explain(label, ["Could not find any implementation for node x."])
        return Portable(label.encode(), Account((), 1000, 1000), 0)

    monkeypatch.setattr("sd_export.tensorrt_.portable.build_portable", made)
    with pytest.raises(ExportError, match="building unet 128x128") if failing == "unet" else nullcontext():
        build(portable(bundle))
    assert f"{failing} 128x128" in capsys.readouterr().err.split("is left out")[0]
    labels = [record.component for record in manifest_of(bundle).engines]
    assert failing not in labels and len(labels) == 6


@pytest.mark.usefixtures("library")
def test_a_graph_that_the_parser_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"building pixels plain failed: .*Failed to parse the ONNX model"):
        build_portable("pixels plain", tmp_path / "model.onnx", {})


def test_the_account_is_held_against_what_was_asked_for(demo_bundle: Path) -> None:
    """A product that reads float32 in a float16 engine, and an attention that is not fused, are remarks."""
    manifest = replace(manifest_of(demo_bundle), precision="fp16")
    unet = plan_builds(manifest, portable(), VERSION)[0]
    half, full = Tensor((2, 8), "Half"), Tensor((2, 8), "Float")
    launches = (
        Launch("attention", FUSED_ATTENTION, (half, half), (half,)),
        Launch("sum", "CastAdd", (full,), (half,)),
        Launch("product", "gemm", (full, half), (half,)),
    )
    account = Account(launches, 1000, 2000)
    checked = check_structure(unet, Portable(b"", account, attentions=2))
    fused, slow = checked.remarks
    assert "the engine's layers show 1 fused attentions, where the graph has 2" in fused
    assert slow == "1 layers compute in float32, product first: report it, please"
    assert (checked.how, checked.activation_memory) == ("structure", 1000)
    assert float32_products(account, "fp32") == []
    assert not check_structure(unet, Portable(b"", replace(account, launches=launches[:2]), attentions=1)).remarks


@pytest.mark.usefixtures("library")
def test_a_limit_that_is_too_small_is_named(bundle: Path) -> None:
    graph = manifest_of(bundle).components["vae_decoder"].graph("trt-basic")
    (planned,) = (p for p in plan_builds(manifest_of(bundle), portable(), VERSION) if p.component == "vae_decoder")
    with pytest.raises(ExportError, match="--workspace"):
        build_portable("vae_decoder", bundle / graph.path, planned.profile, workspace=1000)
