"""Engines of TensorRT for RTX, really built: the library needs no GPU for it, and its log says what it made."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from sd_export.cli import main
from sd_export.graphs.forms import FORMS, rewrite
from sd_export.graphs.precision import to_float16
from sd_export.graphs.weights import save, save_graph
from sd_export.tensorrt_.build import build
from sd_export.tensorrt_.engine import BuildLog, build_logger, mark_exchangeable
from sd_export.tensorrt_.failures import explain
from sd_export.tensorrt_.launches import FUSED_ATTENTION, Account, Launch, Tensor
from sd_export.tensorrt_.local import matrices
from sd_export.tensorrt_.plan import BuildOptions, plan_builds
from sd_export.tensorrt_.portable import Portable, build_portable, check_structure, float32_products, import_rtx
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, Manifest, record_file
from sd_runtime.errors import ExportError, UsageError

VERSION = "1.7.1"  # any: nothing that is planned depends on it
SERVED = ("8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class Engines:
    """A bundle with engines: what the build said, and what the builder says of each engine, by its label."""

    root: Path
    said: str
    made: Mapping[str, Portable]


@pytest.fixture(scope="session")
def library() -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13", exc_type=ImportError)


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo_bundle, tmp_path / "demo")
    return tmp_path / "demo"


@pytest.fixture(scope="session")
def half_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with its networks in float16, as `sd-export --precision fp16` writes the graphs that are built here."""
    folder = tmp_path_factory.mktemp("half")
    root, made = folder / "half", folder / "networks"
    shutil.copytree(demo_bundle, root)
    manifest = manifest_of(root)
    components, files = dict(manifest.components), dict(manifest.files)
    for name, component in manifest.components.items():
        if component.weights is None:
            continue
        plain, basic = component.graph("plain").path, component.graph("trt-basic").path
        model = ir.load(root / plain)
        to_float16(model)
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


@pytest.fixture(scope="session")
def half(library: None, half_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return built(half_bundle, tmp_path_factory, batches=(2,))


@pytest.fixture(scope="session")
def brain(library: None, demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """In bfloat16, dynamic ones too."""
    return built(demo_bundle, tmp_path_factory, precision="bf16", fallback=True)


@pytest.fixture(scope="session")
def full(library: None, demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return built(demo_bundle, tmp_path_factory)


def built(source: Path, folders: pytest.TempPathFactory, **fields: object) -> Engines:
    """The engines of a copy of a bundle, really built."""
    root = shutil.copytree(source, folders.mktemp("built") / source.name)
    made: dict[str, Portable] = {}

    def keep(label: str, *arguments: Any) -> Portable:
        made[label] = build_portable(label, *arguments)
        return made[label]

    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.setattr("sd_export.tensorrt_.portable.build_portable", keep)
        build(portable(root, **fields), quiet=False)
    return Engines(root, said.getvalue(), made)


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


def test_a_bundle_gets_engines_without_a_gpu(half: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, for all RTX GPUs; a second time, none."""
    assert "for compute capability 8.0+; no GPU is needed" in half.said
    assert "left out" not in half.said and "instead" not in half.said
    opened = Bundle.open(half.root)
    records = opened.manifest.engines
    opened.verify(record.path for record in records)
    networks = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert sorted({record.component for record in records}) == ["pixels", "sampler_step", *networks]
    for record in records:
        target = record.target
        assert (record.checked, target.library, target.compute_capability) == ("structure", "tensorrt_rtx", "8.0")
        assert set(SERVED) <= set(target.serves) and not {"7.5", "9.0", "10.0"} & set(target.serves)
        assert record.path.startswith(f"engines/sm80-rtx{target.tensorrt}/")
        assert record.activation_memory > 0 or record.component == "pixels"
        assert (half.root / record.path).stat().st_size > 10_000
    build(portable(half.root, batches=(2,)))
    assert capsys.readouterr().err.count("is up to date") == len(records)


# Of the demo at its own size, in both half precisions: launches, of these casts and moves and nothing else, bytes of
# activations, and attentions that must be fused; the autoencoder's one is as wide as its channels.
MOST = {
    "unet 128x128": (302, 18, 19e6, 20),
    "vae_decoder 128x128 batch 1": (96, 7, 20e6, 0),
    "vae_encoder 128x128 batch 1": (63, 5, 18e6, 0),
    "text_encoder dynamic": (24, 0, 10e6, 2),
}


@pytest.mark.parametrize("engines", ["half", "brain"])
def test_the_builder_has_made_of_it_what_was_meant(engines: str, request: pytest.FixtureRequest) -> None:
    """Any number of rows in the UNet: every attention is fused, all products are in half precision, little is moved."""
    made: Engines = request.getfixturevalue(engines)
    dtype = {"half": "Half", "brain": "BFloat16"}[engines]
    assert "left out" not in made.said and "not fused" not in made.said and "float32" not in made.said
    for label, (launches, moves, activations, attentions) in MOST.items():
        account = made.made[label].account
        assert len(account.launches) <= launches, label
        assert account.moves <= moves, label
        assert 0 < account.activations <= activations, label
        assert account.of(FUSED_ATTENTION) == attentions, label
        assert float32_products(account, "fp16") == []
        convolved = {tensor.dtype for one in account.launches if one.kind == "correlation" for tensor in one.inputs}
        assert convolved == (set() if label.startswith("text") else {dtype})


def test_dynamic_engines_fuse_as_many_attentions(brain: Engines) -> None:
    """Of any size, number of rows and length of the prompt."""
    account = brain.made["unet dynamic"].account
    assert account.of(FUSED_ATTENTION) == brain.made["unet dynamic"].attentions == 20
    assert float32_products(account, "bf16") == []
    records = manifest_of(brain.root).engines
    assert len(records) == 10 and {record.precision for record in records if record.weights} == {"bf16"}


def test_float32_is_float32(full: Engines) -> None:
    """No kernel fuses its attention, and that is no remark."""
    assert "left out" not in full.said and "fused" not in full.said
    unet = full.made["unet 128x128"]
    assert (unet.account.of(FUSED_ATTENTION), unet.attentions) == (0, 20)
    read = {tensor.dtype for launch in unet.account.launches for tensor in launch.inputs}
    assert "Float" in read and not {"Half", "BFloat16"} & read
    assert {record.precision for record in manifest_of(full.root).engines} == {"fp32"}


@pytest.mark.usefixtures("library")
def test_turing_gets_engines_of_its_own(half_bundle: Path, tmp_path: Path) -> None:
    root = shutil.copytree(half_bundle, tmp_path / "half")
    only(root, "text_encoder", "pixels")
    build(portable(root, turing=True))
    served = {
        (record.component, record.target.serves[0], len(record.target.serves) > 1, record.path.split("/")[1][:4])
        for record in manifest_of(root).engines
    }
    assert served == {
        (name, *rest) for name in ("text_encoder", "pixels") for rest in (("8.0", True, "sm80"), ("7.5", False, "sm75"))
    }


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("component", ["unet", "vae_decoder", "vae_encoder", "text_encoder"])
def test_the_parser_knows_weights_by_their_names_in_the_file(component: str, demo_bundle: Path) -> None:
    """By which they are marked as exchangeable; TensorRT's own parser is the same code."""
    trt, opened = import_rtx(), Bundle.open(demo_bundle)
    builder = trt.Builder(build_logger(trt, BuildLog()))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    graph = opened.component(component).graph("trt-basic")
    assert trt.OnnxParser(network, builder.logger).parse_from_file(str(demo_bundle / graph.path))
    names = matrices(opened, component)
    mark_exchangeable(network, names)
    assert names and all(network.are_weights_marked_refittable(name) for name in names)


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
