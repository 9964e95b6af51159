"""bundle and manifest: what is listed is there, unchanged, and inside the folder."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_runtime.bundle import digests
from sd_runtime.bundle.bundle import Bundle, find_bundle
from sd_runtime.bundle.manifest import (
    MANIFEST,
    Component,
    Defaults,
    Graph,
    Latent,
    Manifest,
    Source,
    check_relative,
    record_file,
)
from sd_runtime.errors import BundleError, UsageError
from sd_runtime.request import make_request
from sd_runtime.tensor import Dim, TensorSpec
from small_bundle import small_bundle


def write_bundle(root: Path, files: dict[str, bytes]) -> Manifest:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    spec = TensorSpec("x", "float32", (Dim("batch", 1, 2, 4), 3))
    manifest = Manifest(
        name=root.name,
        source=Source("owner/model", "abc", {"unet/model.safetensors": "00"}),
        precision="fp32",
        latent=Latent(4, 8, 0.18215),
        defaults=Defaults(50, 7.5, 512, 512),
        components={"unet": Component("unet/w.safetensors", {"plain": Graph("unet/model.onnx", (spec,), (spec,))})},
        files={name: record_file(root / name) for name in files},
    )
    (root / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


FILES = {"unet/w.safetensors": bytes(range(256)) * 40, "unet/model.onnx": b"graph", "empty": b""}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    write_bundle(folder, FILES)
    return folder


def test_round_trip(root: Path) -> None:
    bundle = Bundle.open(root)
    assert Manifest.from_bytes(bundle.manifest.to_bytes()) == bundle.manifest
    assert bundle.read("unet/model.onnx") == b"graph"
    assert bundle.read("empty") == b""
    bundle.verify(FILES)
    assert bundle.under("unet") == {"w.safetensors": "unet/w.safetensors", "model.onnx": "unet/model.onnx"}


def test_fault_07_all_missing_files_in_one_error(root: Path) -> None:
    for name in ("unet/model.onnx", "empty"):
        (root / name).unlink()
    remedy = rf"export it again, from owner/model: sd-export --model … --force --output {root}$"
    with pytest.raises(BundleError, match=rf"missing unet/model\.onnx, empty; {remedy}"):
        Bundle.open(root)


def test_fault_06_truncated_file_is_found_on_opening(root: Path) -> None:
    (root / "unet/w.safetensors").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"unet/w\.safetensors \(5 bytes, declared 10240\)"):
        Bundle.open(root)


@pytest.mark.parametrize("position", [0, 5000, 10239])
def test_fault_03_one_flipped_bit(root: Path, position: int) -> None:
    data = bytearray(FILES["unet/w.safetensors"])
    data[position] ^= 1
    (root / "unet/w.safetensors").write_bytes(bytes(data))
    bundle = Bundle.open(root)
    for check in (lambda: bundle.verify(["unet/w.safetensors"]), lambda: bundle.read("unet/w.safetensors")):
        with pytest.raises(BundleError, match=r"unet/w\.safetensors .* damaged"):
            check()


def test_chunks_cover_the_whole_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK", 1000)
    write_bundle(root, FILES)
    bundle = Bundle.open(root)
    assert len(bundle.manifest.files["unet/w.safetensors"].sha256) == 11
    bundle.verify(FILES)
    assert bundle.read("unet/w.safetensors") == FILES["unet/w.safetensors"]


def test_fault_02_symlink_out_of_the_bundle(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"graph")
    (root / "unet/model.onnx").unlink()
    (root / "unet/model.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(root)


@given(st.text(alphabet="ab./\\\0:", max_size=12))
def test_fault_01_no_manifest_path_leads_out(path: str) -> None:
    try:
        check_relative(path)
    except BundleError:
        return
    assert not Path(path).is_absolute()
    assert os.path.normpath(f"/b/{path}").startswith("/b")


def test_fault_01_hostile_path_in_manifest(root: Path) -> None:
    manifest = Bundle.open(root).manifest
    bad = replace(manifest, files={"../secret": manifest.files["empty"]})
    (root / MANIFEST).write_bytes(bad.to_bytes())
    with pytest.raises(BundleError, match=r"\.\./secret"):
        Bundle.open(root)


def edit(root: Path, path: str, value: object) -> None:
    """Set a value in the manifest, named as its errors name it."""
    document = json.loads((root / MANIFEST).read_text())
    *folders, last = path.split(".")
    place = document
    for folder in folders:
        place = place[folder]
    place[last] = value
    (root / MANIFEST).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        (2, "the bundle is newer than this program: pip install --upgrade sd-lean"),
        (0, "if this is a bundle, remove it"),
    ],
)
def test_fault_05_other_schema_version(root: Path, version: int, remedy: str) -> None:
    edit(root, "schema_version", version)
    expected = rf"^bundle {root}: manifest\.json: schema_version: got {version}, accepted 1; {remedy}"
    with pytest.raises(BundleError, match=expected):
        Bundle.open(root)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}'])
def test_manifest_errors_name_the_bundle_and_the_remedy(root: Path, text: str) -> None:
    (root / MANIFEST).write_text(text)
    expected = rf"^bundle {root}: manifest\.json.*export it again: sd-export --model … --output {root}$"
    with pytest.raises(BundleError, match=expected):
        Bundle.open(root)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("files", {}, "file of unet: got unet/w.safetensors, accepted one that `files` lists"),
        ("components.unet.weights", "nope", "file of unet: got nope, accepted one that"),
        ("components.unet.graphs.plain.path", "nope", "file of unet: got nope, accepted one that"),
        ("latent.pixels", 0, "latent.pixels: got 0, accepted 1 … 64"),
        ("latent.channels", 0, "latent.channels: got 0, accepted 1 … 64"),
        ("latent.channels", 10**9, "latent.channels: got 1000000000"),
        ("latent.scaling_factor", 0, "latent.scaling_factor: got 0.0, accepted 0.001 … 1000"),
        ("latent.scaling_factor", 1e300, r"latent.scaling_factor: got 1e\+300"),
        ("latent.preview", [[1.0], [1.0, 2.0]], "latent.preview: got .*, accepted rows of one length"),
        ("latent.preview", [], "latent.preview: got"),
        (
            "defaults.num_inference_steps",
            0,
            "defaults.num_inference_steps: got 0, accepted whole",
        ),
        ("defaults.guidance_scale", -1, "defaults.guidance_scale: got -1.0, accepted numbers from 0 to 100"),
        ("defaults.height", 0, "defaults.height: got 0, accepted whole numbers from 1 to 65536"),
        ("defaults.width", 1 << 20, "defaults.width: got 1048576"),
    ],
)
def test_fault_05_edited_manifests(root: Path, path: str, value: object, message: str) -> None:
    edit(root, path, value)
    with pytest.raises(BundleError, match=message):
        Bundle.open(root)


@pytest.mark.parametrize("extreme", [Defaults(1, 0.0, 1, 1), Defaults(1000, 100.0, 1 << 16, 1 << 16)])
def test_defaults_have_the_ranges_of_requests(extreme: Defaults) -> None:
    make_request(extreme, "")
    for field, step in (("num_inference_steps", 1), ("guidance_scale", 1.0), ("height", 1), ("width", 1)):
        beyond = getattr(extreme, field) + (step if extreme.height > 1 else -step)
        with pytest.raises(UsageError, match=field):
            make_request(Defaults(1, 0.0, 1, 1), "", **{field: beyond})
        with pytest.raises(UsageError, match=field):
            replace(extreme, **{field: beyond})


def test_unknown_component_and_form(root: Path) -> None:
    bundle = Bundle.open(root)
    with pytest.raises(BundleError, match=r"has no vae_encoder: got unet; export it with this component, from"):
        bundle.component("vae_encoder")
    with pytest.raises(BundleError, match="got fast, accepted plain"):
        bundle.component("unet").graph("fast")


def test_find_by_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_LEAN_HOME", str(tmp_path))
    with pytest.raises(BundleError, match="sd-export --model demo"):
        find_bundle(None)
    write_bundle(tmp_path / "bundles" / "one", FILES)
    assert find_bundle(None) == find_bundle("one") == find_bundle("owner/one") == tmp_path / "bundles" / "one"
    assert find_bundle(str(tmp_path / "bundles" / "one")) == tmp_path / "bundles" / "one"
    write_bundle(tmp_path / "bundles" / "two", FILES)
    with pytest.raises(BundleError, match="one, two"):
        find_bundle(None)
    with pytest.raises(BundleError, match="got three, accepted exported: one, two"):
        find_bundle("three")


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle here"):
        Bundle.open(tmp_path)


# ---- what cannot be read (the tests may run as root, who may read everything) ----------------------------------------


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Lets a method of Path fail for one path."""

    def patch(method: str, refused: Path) -> None:
        original = getattr(Path, method)

        def replacement(path: Path, *arguments: object, **options: object) -> object:
            if path == refused:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return original(path, *arguments, **options)

        monkeypatch.setattr(Path, method, replacement)

    return patch


@pytest.mark.parametrize("name", ["unet/model.onnx", "empty", MANIFEST])
def test_unreadable_files(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = rf"^cannot read {root / name}: got Permission denied; allow yourself to read it"
    bundle = Bundle.open(root)
    opened = os.open

    def refused(path: Any, *given: Any, **more: Any) -> int:
        if Path(path).name == Path(name).name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *given, **more)

    monkeypatch.setattr(os, "open", refused)
    if name == MANIFEST:
        with pytest.raises(BundleError, match=message):
            Bundle.open(root)
        return
    for check in (lambda: bundle.verify(FILES), lambda: bundle.read(name)):
        with pytest.raises(BundleError, match=message):
            check()


def test_unreadable_folder_in_a_bundle(root: Path, refuse: Callable[[str, Path], None]) -> None:
    refuse("stat", root / "unet/model.onnx")
    with pytest.raises(BundleError, match=r"^cannot read .*unet/model\.onnx: got Permission denied; allow"):
        Bundle.open(root)


def test_unreadable_model(root: Path, refuse: Callable[[str, Path], None]) -> None:
    refuse("stat", root / MANIFEST)
    with pytest.raises(BundleError, match=rf"^cannot read {root}: got Permission denied; allow"):
        find_bundle(str(root))


def test_links_in_a_circle(root: Path) -> None:
    (root / "empty").unlink()
    (root / "empty").symlink_to("empty")
    with pytest.raises(BundleError, match=r"^cannot read .*empty: got Too many levels of symbolic links"):
        Bundle.open(root)


def test_names_that_no_folder_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_LEAN_HOME", str(tmp_path))
    with pytest.raises(BundleError, match=r"^unknown model: got m{79}…, accepted .*; sd-export --model m{79}…$"):
        find_bundle("m" * 300)
    monkeypatch.setenv("SD_LEAN_HOME", str(tmp_path / ("h" * 300)))
    with pytest.raises(BundleError, match="hhh"):  # unreadable or, to later Pythons, empty
        find_bundle(None)


def test_a_link_that_leads_nowhere_is_not_called_unknown(tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to("gone")
    with pytest.raises(BundleError, match="it is a link to 'gone', which is not there"):
        find_bundle(str(tmp_path / "b"))


def test_a_bundle_is_opened_by_text_as_well(tmp_path: Path) -> None:
    root = small_bundle(tmp_path / "small")
    assert Bundle.open(str(root)).manifest == Bundle.open(root).manifest
