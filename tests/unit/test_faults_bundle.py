"""Faults of a bundle's files, each named after its row in docs/faults.md."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.numpy import save
from sd_runtime.bundle import digests
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.graph_file import MAX_GRAPH, WeightsFile, check_graph, weights_file
from sd_runtime.bundle.manifest import MANIFEST, MAX_FILE, MAX_MANIFEST, FileRecord, Manifest
from sd_runtime.bundle.safetensors_file import MAX_TENSORS, open_safetensors
from sd_runtime.errors import BundleError, EngineError
from small_bundle import (
    FILE,
    GRAPH,
    ONES,
    WEIGHTS,
    external,
    model,
    small_bundle,
    small_engine,
)

ALLOWED = WeightsFile("model.safetensors", 4096)
EXPECTED = ONES @ WEIGHTS


@pytest.fixture
def never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime sees no byte."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("a session was made"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle")


# ---- 41: what a graph names ------------------------------------------------------------------------------------------


def constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor)


def branch(name: str, *initializers: TensorProto, nodes: tuple[onnx.NodeProto, ...] = ()) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 2])
    return helper.make_graph(list(nodes), name, [], [output], list(initializers))


def conditional(*branches: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["x"], ["y"], then_branch=branches[0], else_branch=branches[-1])


def sparse(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [3, 2]))
    return made


def function(tensor: TensorProto) -> onnx.ModelProto:
    made = model(external(), nodes=[helper.make_node("Own", ["x"], ["y"], domain="own")])
    opsets = [helper.make_opsetid("", 20)]
    made.functions.append(helper.make_function("own", "Own", ["x"], ["c"], [constant(tensor)], opsets))
    return made


def training(tensor: TensorProto) -> onnx.ModelProto:
    made = model(external())
    made.training_info.add().initialization.CopyFrom(branch("t", tensor))
    return made


def attributes(tensor: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Many", [], ["c"], domain="own")
    node.attribute.append(onnx.AttributeProto(name="all", type=onnx.AttributeProto.TENSORS, tensors=[tensor]))
    return model(external(), nodes=[node])


def sparse_attribute(tensor: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["c"])
    value = helper.make_sparse_tensor(tensor, helper.make_tensor("i", TensorProto.INT64, [1], [0]), [3, 2])
    node.attribute.append(
        onnx.AttributeProto(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=value)
    )
    return model(external(), nodes=[node])


PLACES: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "initializer": lambda tensor: model(tensor),
    "second initializer": lambda tensor: model(external(), tensor),
    "body of an If": lambda tensor: model(external(), nodes=[conditional(branch("t", tensor), branch("e"))]),
    "body within a body": lambda tensor: model(
        external(), nodes=[conditional(branch("t", nodes=(conditional(branch("e", tensor)),)))]
    ),
    "training graph": training,
}
ATTRIBUTES: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "attribute": lambda tensor: model(external(), nodes=[constant(tensor)]),
    "attribute in a body": lambda tensor: model(
        external(), nodes=[conditional(branch("t", nodes=(constant(tensor),)))]
    ),
    "list of tensors": attributes,
    "sparse initializer": sparse,
    "sparse attribute": sparse_attribute,
    "function": function,
}
ESCAPES = [
    "../secret",
    "../unet/model.safetensors",
    "./model.safetensors",
    "/etc/passwd",
    "model.safetensors/../../secret",
    "link",
    "",
    "model.safetensors\0",
    "MODEL.SAFETENSORS",
    "*/_ORT_MEM_ADDR_/*",  # ONNX Runtime's own: the offset is then an address in its memory
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ESCAPES)
def test_fault_41_external_data_elsewhere(tmp_path: Path, place: str, location: str, never_opened: None) -> None:
    root = small_bundle(tmp_path / "bundle", PLACES[place](external(location=location)).SerializeToString())
    (root / "unet/link").symlink_to("model.safetensors")
    with pytest.raises(BundleError, match=r"^unet/model\.onnx: external data of 'w'.*accepted model\.safetensors$"):
        small_engine(root)


@pytest.mark.parametrize("place", ATTRIBUTES)
def test_fault_41_external_data_of_other_tensors(tmp_path: Path, place: str, never_opened: None) -> None:
    """Also of the weights file itself: exports write none."""
    root = small_bundle(tmp_path / "bundle", ATTRIBUTES[place](external()).SerializeToString())
    with pytest.raises(BundleError, match=r"^unet/model\.onnx: external data of 'w' in a.*of initializers only$"):
        small_engine(root)


@pytest.mark.parametrize("place", PLACES)
def test_fault_41_the_weights_file_is_accepted_where_initializers_are(place: str) -> None:
    check_graph(GRAPH, PLACES[place](external()).SerializeToString(), ALLOWED)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offset": "4090"}, r"bytes 4090 to 4114, accepted a part of the 4096 of model\.safetensors"),
        ({"length": "4096"}, "accepted a part of the 4096"),
        ({"offset": str(1 << 64)}, "accepted numbers of bytes"),
        ({"offset": "-8"}, "accepted numbers of bytes"),
        ({"offset": " 8"}, "accepted numbers of bytes"),
        ({"length": "0x8"}, "accepted numbers of bytes"),
        ({"length": "٨"}, "accepted numbers of bytes"),
        ({"prepacked_0": "x"}, "accepted location, offset and length, once each"),
        ({"checksum": "x"}, "accepted location, offset and length, once each"),
    ],
)
def test_fault_41_parts_that_are_not_there(changed: dict[str, str], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_graph(GRAPH, model(external(**changed)).SerializeToString(), ALLOWED)


def test_fault_41_what_is_said_twice_or_by_halves() -> None:
    twice, unmarked, marked = external(), external(), external()
    twice.external_data.add(key="location", value="../secret")
    unmarked.data_location = TensorProto.DEFAULT
    del marked.external_data[:]
    marked.external_data.add(key="Location", value="../location")
    for tensor in (twice, unmarked, marked):
        with pytest.raises(BundleError, match="accepted location, offset and length, once each, marked as external"):
            check_graph(GRAPH, model(tensor).SerializeToString(), ALLOWED)


def test_fault_41_a_graph_without_weights_names_no_file() -> None:
    with pytest.raises(BundleError, match=r"got model\.safetensors, accepted no file"):
        check_graph(GRAPH, model(external()).SerializeToString(), None)
    check_graph(GRAPH, model(helper.make_tensor("w", TensorProto.FLOAT, [3, 2], WEIGHTS)).SerializeToString(), None)


def test_fault_41_weights_in_another_folder_than_the_graph() -> None:
    with pytest.raises(BundleError, match=r"weights of unet/model\.onnx: got vae/w, accepted a file in unet"):
        weights_file(GRAPH, "vae/w", 1)
    assert weights_file(GRAPH, "unet/deep/w", 1) == WeightsFile("deep/w", 1)


def test_fault_41_other_formats_and_operators_that_open_files() -> None:
    ort = b"\x12\x1a  ORTM" + b" " * 20 + model(external()).SerializeToString()  # both formats at once
    assert onnx.load_from_string(ort).producer_name.strip() == "ORTM"
    with pytest.raises(BundleError, match="is not an ONNX model"):
        check_graph(GRAPH, ort, ALLOWED)
    context = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context="location")
    with pytest.raises(BundleError, match="operator: got EPContext"):
        check_graph(GRAPH, model(nodes=[context]).SerializeToString(), ALLOWED)


def test_fault_41_sizes_and_depths_are_bounded() -> None:
    with pytest.raises(BundleError, match=f"accepted at most {MAX_GRAPH}"):
        check_graph(GRAPH, bytes(MAX_GRAPH + 1), ALLOWED)
    body = branch("location", external())
    for _ in range(12):
        body = branch("t", nodes=(conditional(body, branch("e")),))
    with pytest.raises(BundleError, match="graphs within graphs: got more, accepted at most 8 deep"):
        check_graph(GRAPH, model(nodes=[conditional(body)]).SerializeToString(), ALLOWED)


def named_files(made: onnx.ModelProto) -> set[str]:
    """Every location in a model, as protobuf and onnx read it: their own walk, over all fields."""

    def walk(message: object) -> set[str]:
        found = set()
        if isinstance(message, TensorProto):
            found |= {entry.value for entry in message.external_data if entry.key == "location"}
        for _, value in message.ListFields():  # type: ignore[attr-defined]
            for item in value if hasattr(value, "__len__") and not isinstance(value, (str, bytes)) else [value]:
                if hasattr(item, "ListFields"):
                    found |= walk(item)
        return found

    return walk(made)


SEEDS = [place(external()).SerializeToString() for place in (*PLACES.values(), *ATTRIBUTES.values())]


@settings(max_examples=600)
@given(st.data())
def test_fault_41_mutated_graphs_are_refused_or_name_the_weights_only(data: st.DataObject) -> None:
    """Whatever protobuf itself makes of the bytes, what we accept names no other file."""
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["byte", "cut", "double", "escape"]))
        if change == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del content[at : at + data.draw(st.integers(1, 30))]
        elif change == "double":
            piece = bytes(content[at : at + data.draw(st.integers(1, 60))])
            content[at:at] = piece
        else:
            content = bytearray(bytes(content).replace(b"model.safetensors", b"../../../../secre", 1))
    try:
        check_graph(GRAPH, bytes(content), ALLOWED)
    except BundleError:
        return
    try:
        read = onnx.load_from_string(bytes(content))
    except Exception:  # protobuf refuses more than we do
        return
    assert named_files(read) <= {"model.safetensors"}


@given(st.sampled_from([b"", b"\x3a\x7f"]), st.binary(max_size=200))
def test_fault_41_random_bytes_only_raise_bundle_error(start: bytes, content: bytes) -> None:
    with suppress(BundleError):
        check_graph(GRAPH, start + content, ALLOWED)


def test_fault_41_large_hostile_graphs_take_seconds_at_most() -> None:
    """A million fields, each looked at."""
    tensor = external(location="../" + "location" * 10).SerializeToString()
    content = (b"\x2a" + bytes([0x80 | len(tensor) & 0x7F, len(tensor) >> 7]) + tensor) * 20_000
    bulk = b"\x08\x01" * 1_000_000 + b"location"
    for inner in (bulk, content):
        started = time.perf_counter()
        size = len(inner)
        varint = bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21])
        with pytest.raises(BundleError):
            check_graph(GRAPH, b"\x3a" + varint + inner, ALLOWED)
        assert time.perf_counter() - started < 20


def test_fault_41_every_graph_of_the_demo_bundle_is_read(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    for name, component in bundle.manifest.components.items():
        for form in component.graphs:
            files = bundle.open_graph(name, form)
            locations = named_files(onnx.load_from_string(files.content))
            assert locations == (set() if component.weights is None else {"model.safetensors"})


# ---- 4 and 42: the verified bytes are those that are used ------------------------------------------------------------


def rewrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def rename_over(path: Path, content: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(content)
    other.replace(path)


def truncate(path: Path, content: bytes) -> None:
    os.truncate(path, 10)


def forge(path: Path, content: bytes) -> None:
    """Written in place, and the time of it set back."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [rewrite, rename_over, truncate, forge]
OTHER = save({"w": -WEIGHTS})
Change = Callable[[Path, bytes], None]


@pytest.mark.parametrize("change", CHANGES)
def test_fault_42_weights_changed_while_they_are_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    session = onnxruntime.InferenceSession

    def late(*given: object, **more: object) -> object:
        change(root / FILE, OTHER)
        return session(*given, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", late)
    with pytest.raises((BundleError, EngineError), match=r"unet/model\.(safetensors|onnx)"):
        small_engine(root)


def test_fault_42_another_file_put_there_for_the_moment_of_loading(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name leads to the verified file before and after, and to another one in between."""
    session, path = onnxruntime.InferenceSession, root / FILE

    def late(*given: object, **more: object) -> object:
        path.rename(root / "kept")
        path.write_bytes(OTHER)
        try:
            return session(*given, **more)
        finally:
            (root / "kept").replace(path)

    monkeypatch.setattr(onnxruntime, "InferenceSession", late)
    with pytest.raises(BundleError, match="changed again and again while loaded; try again"):
        small_engine(root)


def test_fault_42_a_link_made_while_loading_is_no_harm(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back-up that copies by hard links changes the file's times: it is loaded once more."""
    session, links = onnxruntime.InferenceSession, iter(["first", "second"])

    def late(*given: object, **more: object) -> object:
        if name := next(links, None):
            os.link(root / FILE, root / name)
        return session(*given, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", late)
    np.testing.assert_array_equal(small_engine(root).run({"x": ONES})["y"], EXPECTED)
    assert (root / "second").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="where an open folder has no name")
def test_fault_42_a_folder_put_there_for_the_moment_of_loading_is_not_seen(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, folder = onnxruntime.InferenceSession, root / "unet"

    def late(*given: object, **more: object) -> object:
        folder.rename(root / "kept")
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(OTHER)
        try:
            return session(*given, **more)
        finally:
            (folder / "model.safetensors").unlink()
            folder.rmdir()
            (root / "kept").rename(folder)

    monkeypatch.setattr(onnxruntime, "InferenceSession", late)
    np.testing.assert_array_equal(small_engine(root).run({"x": ONES})["y"], EXPECTED)


@pytest.mark.parametrize("prepacked", [True, False])
@pytest.mark.parametrize("change", [rewrite, truncate, forge])
def test_fault_42_weights_changed_while_they_are_in_use(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: Change, prepacked: bool
) -> None:
    monkeypatch.setattr("sd_runtime.engines.onnxruntime_.cpu.PREPACK_LIMIT", 1 << 20 if prepacked else 0)
    engine = small_engine(root)
    np.testing.assert_array_equal(engine.run({"x": ONES})["y"], EXPECTED)
    change(root / FILE, OTHER)
    with pytest.raises(BundleError, match=rf"^unet/model\.safetensors in bundle {root} is damaged: got "):
        engine.run({"x": ONES})


def test_fault_42_weights_replaced_while_they_are_in_use(root: Path) -> None:
    """As a new export does: what was loaded goes on, with the bytes that were verified; other uses of them are none."""
    engine = small_engine(root)
    rename_over(root / FILE, OTHER)
    np.testing.assert_array_equal(engine.run({"x": ONES})["y"], EXPECTED)
    (root / FILE).unlink()
    np.testing.assert_array_equal(engine.run({"x": ONES})["y"], EXPECTED)
    copied = root / "backup"
    os.link(root / GRAPH, copied)  # changes the time of the file's last change, not the file
    (root / GRAPH).touch()
    np.testing.assert_array_equal(engine.run({"x": ONES})["y"], EXPECTED)


def test_fault_42_touched_weights_are_read_again_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, hashed = small_engine(root), []
    original = digests.of_file
    monkeypatch.setattr(digests, "of_file", lambda *given: hashed.append(1) or original(*given))
    os.link(root / FILE, root / "backup")
    for _ in range(3):
        np.testing.assert_array_equal(engine.run({"x": ONES})["y"], EXPECTED)
    assert len(hashed) == 1


def test_fault_42_tensors_that_we_map_ourselves(root: Path) -> None:
    tensors = Bundle.open(root).tensors(FILE)
    np.testing.assert_array_equal(tensors["w"], WEIGHTS)
    truncate(root / FILE, b"")
    with pytest.raises(BundleError, match=r"is damaged: got 10 bytes, accepted"):
        tensors["w"]


def test_fault_04_a_file_swapped_after_hashing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed on is what was hashed, whatever lies there by then."""
    bundle, content = Bundle.open(root), (root / GRAPH).read_bytes()
    of_bytes = digests.of_bytes

    def swap(data: bytes) -> tuple[str, ...]:
        (root / GRAPH).write_bytes(b"swapped")
        return of_bytes(data)

    monkeypatch.setattr(digests, "of_bytes", swap)
    assert bundle.read(GRAPH) == content


def test_fault_03_a_damaged_graph_is_not_handed_to_onnxruntime(root: Path, never_opened: None) -> None:
    for name in (GRAPH, FILE):
        data = bytearray((root / name).read_bytes())
        data[len(data) // 2] ^= 1
        (root / name).write_bytes(data)
        with pytest.raises(BundleError, match=rf"^{name} in bundle .* is damaged: got SHA-256"):
            small_engine(root)
        data[len(data) // 2] ^= 1
        (root / name).write_bytes(data)


# ---- 2: links --------------------------------------------------------------------------------------------------------


def test_fault_02_a_manifest_that_is_a_link(root: Path, tmp_path: Path) -> None:
    (root / MANIFEST).rename(tmp_path / "elsewhere.json")
    (root / MANIFEST).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match=rf"^manifest\.json in bundle {root} leads out of the bundle: got .*; copy"):
        Bundle.open(root)


def test_fault_02_a_folder_that_is_a_link(root: Path, tmp_path: Path) -> None:
    (root / "unet").rename(tmp_path / "elsewhere")
    (root / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(root)


def test_fault_02_a_hard_link_is_its_bytes(root: Path, tmp_path: Path) -> None:
    """Copies that back-ups make share their files: the same bytes are accepted, others are refused."""
    for name in (FILE, GRAPH, MANIFEST):
        os.link(root / name, tmp_path / Path(name).name)
    np.testing.assert_array_equal(small_engine(root).run({"x": ONES})["y"], EXPECTED)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes((root / FILE).stat().st_size))
    (root / FILE).unlink()
    os.link(secret, root / FILE)
    with pytest.raises(BundleError, match="is damaged: got SHA-256"):
        small_engine(root)


def test_fault_02_bytes_changed_through_another_name(root: Path, tmp_path: Path) -> None:
    os.link(root / FILE, tmp_path / "outside")
    engine = small_engine(root)
    (tmp_path / "outside").write_bytes(OTHER)
    with pytest.raises(BundleError, match="is damaged"):
        engine.run({"x": ONES})
    with pytest.raises(BundleError, match="is damaged"):
        small_engine(root)


@pytest.mark.parametrize("name", [MANIFEST, GRAPH, FILE])
def test_fault_52_pipes_in_the_place_of_files(root: Path, name: str) -> None:
    bundle = Bundle.open(root)
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(BundleError):
        Bundle.open(root)
    if name != MANIFEST:
        with pytest.raises(BundleError, match=rf"^cannot read {root / name}: got Not a regular file"):
            bundle.open_graph("unet")


# ---- 5, 6, 45: sizes -------------------------------------------------------------------------------------------------


def test_fault_45_a_manifest_of_six_gigabytes(root: Path) -> None:
    os.truncate(root / MANIFEST, 6 << 30)
    started = time.perf_counter()
    with pytest.raises(BundleError, match=rf"manifest\.json: got more bytes, accepted at most {MAX_MANIFEST}"):
        Bundle.open(root)
    assert time.perf_counter() - started < 2


def grown(manifest: Manifest, name: str, size: int, count: int) -> Manifest:
    return replace(manifest, files=manifest.files | {name: FileRecord(size, ("0" * 64,) * count)})


def test_fault_45_weights_of_200_gigabytes_whose_declared_size_agrees(root: Path, never_opened: None) -> None:
    size = 200 << 30
    os.truncate(root / FILE, size)
    manifest = manifest_of(root)
    (root / MANIFEST).write_bytes(grown(manifest, FILE, size, digests.count(size)).to_bytes())
    with pytest.raises(BundleError, match=rf"files\.{FILE}\.size: got {size}, accepted 0 … {MAX_FILE}"):
        Bundle.open(root)


@pytest.mark.parametrize("count", [0, 2, 3000])
def test_fault_45_the_number_of_digests_fits_the_size(root: Path, count: int) -> None:
    (root / MANIFEST).write_bytes(grown(manifest_of(root), FILE, 1000, count).to_bytes())
    with pytest.raises(BundleError, match=rf"files\.{FILE}\.sha256: got {count}, accepted 1 digests for 1000 bytes"):
        Bundle.open(root)


def test_fault_45_files_that_are_read_whole_have_a_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of 40 GB, a vocabulary of 10 GB: refused by the size that the manifest says, before a byte is read."""
    size = MAX_GRAPH + 1
    os.truncate(root / GRAPH, size)
    (root / MANIFEST).write_bytes(grown(manifest_of(root), GRAPH, size, 1).to_bytes())
    bundle = Bundle.open(root)
    monkeypatch.setattr(digests, "read_at_most", lambda *_: pytest.fail("it was read"))
    with pytest.raises(BundleError, match=rf"^{GRAPH} in bundle .*: got {size} bytes, accepted at most {MAX_GRAPH}$"):
        bundle.open_graph("unet")
    with pytest.raises(BundleError, match=r"accepted at most 10$"):
        bundle.read(FILE, limit=10)


def test_fault_45_headers_of_many_tensors(tmp_path: Path) -> None:
    entry = b'{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    header = b"{" + b",".join(b'"%x":%s' % (i, entry) for i in range(MAX_TENSORS + 1)) + b"}"
    path = tmp_path / "many.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BundleError, match=rf"tensors: got {MAX_TENSORS + 1}, accepted at most {MAX_TENSORS}"):
        open_safetensors(path)


def test_fault_45_a_header_of_a_sparse_giant(tmp_path: Path) -> None:
    path = tmp_path / "giant.safetensors"
    path.write_bytes((90_000_000).to_bytes(8, "little"))
    os.truncate(path, 100 << 30)
    with pytest.raises(BundleError, match="header: got 90000000 bytes, accepted at most"):
        open_safetensors(path)


def test_fault_06_a_declared_size_that_is_not_the_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, and before anything is read."""
    manifest = manifest_of(root)
    monkeypatch.setattr(digests, "of_file", lambda *_: pytest.fail("it was read"))
    for size in (1, 30 << 30):
        (root / MANIFEST).write_bytes(grown(manifest, FILE, size, digests.count(size)).to_bytes())
        with pytest.raises(BundleError, match=rf"truncated or changed: {FILE} \(\d+ bytes, declared {size}\)"):
            Bundle.open(root)


@pytest.mark.parametrize("many", ["keys", "deep"])
def test_fault_05_manifests_that_are_huge_or_deep(root: Path, many: str) -> None:
    text = (root / MANIFEST).read_text()
    if many == "keys":
        document = json.loads(text)
        document["files"] |= {f"f{i}": {"size": 0, "sha256": ["0" * 64]} for i in range(30_000)}
        text = json.dumps(document, separators=(",", ":"))
    else:
        text = text.replace('"name"', '"deep": ' + "[" * 500_000 + "]" * 500_000 + ', "name"', 1)
    (root / MANIFEST).write_text(text)
    started = time.perf_counter()
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(root)
    assert time.perf_counter() - started < 10


def test_fault_05_a_duplicate_key_names_the_bundle(root: Path) -> None:
    text = (root / MANIFEST).read_text()
    (root / MANIFEST).write_text(text.replace('"name"', '"name": "twice", "name"', 1))
    with pytest.raises(BundleError, match=rf"^bundle {root}: manifest\.json: duplicate key: got name"):
        Bundle.open(root)


ODD = st.sampled_from(
    [None, True, 0, -1, 10**30, 1.5, 1e308, "", "x", "\ud800", "a\nb", "../x", [], {}, [[]], [None], ["x"], {"": None}]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@pytest.fixture(scope="module")
def document(demo_bundle: Path) -> dict[str, Any]:
    """The demo's manifest with one network, and an engine for it."""
    found: dict[str, Any] = json.loads((demo_bundle / MANIFEST).read_text())
    graphs = found["components"]["unet"]["graphs"]
    found["components"] = {"unet": found["components"]["unet"] | {"graphs": {"plain": graphs["plain"]}}}
    used = (graphs["plain"]["path"], found["components"]["unet"]["weights"])
    found["files"] = {name: found["files"][name] for name in used}
    sizes = {"min": [1, 4, 8, 8], "opt": [1, 4, 8, 8], "max": [2, 4, 8, 8]}
    target = {"gpu": "g", "compute_capability": "9.0", "tensorrt": "10", "cuda": "13", "driver": "5"}
    engine = {"component": "unet", "form": "plain", "path": used[0], "precision": "fp32", "profile": {"sample": sizes}}
    engine |= {"target": target, "graph": "", "weights": None, "refittable": False, "activation_memory": 1}
    return found | {"engines": [engine]}


@settings(max_examples=400)
@given(st.data())
def test_fault_05_mutated_manifests_are_read_or_refused(document: dict[str, Any], data: st.DataObject) -> None:
    changed = json.loads(json.dumps(document))
    for _ in range(data.draw(st.integers(1, 3))):
        *folders, last = data.draw(st.sampled_from(list(places(changed))))
        place = changed
        for folder in folders:
            place = place[folder]
        how = data.draw(st.sampled_from(["change", "remove", "rename"]))
        value = data.draw(ODD) if how == "change" else place.pop(last)
        if how != "remove" and isinstance(place, dict):
            place[data.draw(st.sampled_from(["", "x", "a\nb"])) if how == "rename" else last] = value
    with suppress(BundleError):
        manifest = Manifest.from_bytes(json.dumps(changed).encode())
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@pytest.mark.parametrize("path", ["a\nb", "a\x1b[31mb", "\ud800", "a\u202eb", ".", ""])
def test_fault_01_paths_that_no_export_writes(root: Path, path: str) -> None:
    (root / MANIFEST).write_bytes(
        json.dumps(json.loads((root / MANIFEST).read_text()) | {"files": {path: {"size": 0, "sha256": ["0"]}}}).encode()
    )
    with pytest.raises(
        BundleError,
        match=r"(path in manifest|manifest\.json: text): got .*, accepted (relative paths inside the bundle|Unicode)",
    ):
        Bundle.open(root)


def manifest_of(root: Path) -> Manifest:
    return Manifest.from_bytes((root / MANIFEST).read_bytes())
