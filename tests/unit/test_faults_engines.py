"""Faults of graphs that are not what the manifest says, and of engines at the wrong time, by docs/faults.md's rows."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from own_backend import OwnBackend
from sd_runtime import Pipeline
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, Component, Graph, Manifest, record_file
from sd_runtime.cli.run import main
from sd_runtime.engines.engines import Engines
from sd_runtime.errors import BundleError, EngineError, OutOfMemoryError
from sd_runtime.tensor import Dim, TensorSpec
from small_bundle import ONES, WEIGHTS, X, Y, external, model, small_bundle, small_engine

PROMPT = "a large yellow star on a blue background"
BATCH = Dim("batch", 1, 1, 16)
DECODER = "vae_decoder/model.onnx"


@pytest.fixture
def copied(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


def record(root: Path, *names: str, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
    """Let the manifest say what lies there now."""
    manifest = Manifest.from_bytes((root / MANIFEST).read_bytes())
    files = manifest.files | {name: record_file(root / name) for name in names}
    (root / MANIFEST).write_bytes(change(replace(manifest, files=files)).to_bytes())


def only_plain(manifest: Manifest, name: str, *outputs: TensorSpec) -> Manifest:
    """A component left with its plain graph, and what the manifest then says of its outputs."""
    component = manifest.components[name]
    graph = component.graph()
    plain = Graph(graph.path, graph.inputs, outputs or graph.outputs)
    return replace(manifest, components=manifest.components | {name: Component(component.weights, {"plain": plain})})


def decoder_that_gives(root: Path, expression: str, dtype: int, rank: int, *outputs: TensorSpec) -> Path:
    """The demo's decoder replaced by a few nodes from `latent_sample` to `sample`."""
    sample = f"{TensorProto.DataType.Name(dtype).lower()}[{', '.join('ijkl'[:rank])}] sample"
    text = f"""<ir_version: 9, opset_import: ["": 20]>
    g (float[b, 4, h, w] latent_sample) => ({sample})
    {{ {expression} }}"""
    (root / DECODER).write_bytes(onnx.parser.parse_model(text).SerializeToString())
    record(root, DECODER, change=lambda manifest: only_plain(manifest, "vae_decoder", *outputs))
    return root


THREE = """
    zero = Constant<value_ints = [0]>() three = Constant<value_ints = [3]>() one = Constant<value_ints = [1]>()
    colours = Slice(latent_sample, zero, three, one)
"""


@pytest.mark.parametrize(
    ("expression", "dtype", "rank", "message"),
    [
        (
            THREE + "sample = Identity(colours)",  # eight times too small
            TensorProto.FLOAT,
            4,
            r"output 'sample': got float32\(1, 3, 16, 16\), accepted float32\(1, 3, 128, 128\)",
        ),
        (
            THREE + "axes = Constant<value_ints = [1]>() sample = ReduceMean<keepdims = 0>(colours, axes)",
            TensorProto.FLOAT,
            3,
            r"output 'sample': got float32\(1, 16, 16\), accepted float32\(1, 3, 128, 128\)",
        ),
        (
            THREE + "sample = Cast<to = 11>(colours)",
            TensorProto.DOUBLE,
            4,
            r"outputs differ from the manifest: got sample tensor\(double\), accepted sample tensor\(float\)",
        ),
        (
            THREE + "sample = Cast<to = 8>(colours)",
            TensorProto.STRING,
            4,
            r"outputs differ from the manifest: got sample tensor\(string\), accepted sample tensor\(float\)",
        ),
    ],
)
def test_fault_48_decoder_outputs_of_a_wrong_shape_rank_or_type(
    copied: Path,
    expression: str,
    dtype: int,
    rank: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    decoder_that_gives(copied, expression, dtype, rank)
    with (
        pytest.raises(EngineError, match=rf"^vae_decoder/model\.onnx: {message}"),
        Pipeline.load(copied, device="cpu") as pipeline,
    ):
        pipeline(PROMPT, seed=1, num_inference_steps=1)
    arguments = ["--model", str(copied), "--device", "cpu", "--steps", "1", "--output", str(tmp_path / "x.png")]
    assert main([PROMPT, *arguments]) == 1
    assert capsys.readouterr().err.startswith("sd-run: vae_decoder/model.onnx: output")
    assert not (tmp_path / "x.png").exists()


def test_fault_48_a_manifest_that_agrees_with_the_wrong_graph(copied: Path) -> None:
    """Both say that a decoder makes one colour of rank 3."""
    spec = TensorSpec("sample", "float32", (BATCH, Dim("latent_height", 8, 16, 128), Dim("latent_width", 8, 16, 128)))
    expression = THREE + "axes = Constant<value_ints = [1]>() sample = ReduceMean<keepdims = 0>(colours, axes)"
    decoder_that_gives(copied, expression, TensorProto.FLOAT, 3, spec)
    message = r"^vae_decoder/model\.onnx: output 'sample' of vae_decoder: got float32\(.*accepted float32\(any, 3, any"
    with pytest.raises(BundleError, match=message):
        Pipeline.load(copied, device="cpu")


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "message"),
    [
        ("unet", (X,), (Y,), "inputs of unet: got x, accepted sample, timestep, encoder_hidden_states"),
        ("text_encoder", None, (Y,), "outputs of text_encoder: got y, accepted last_hidden_state"),
        ("text_encoder", "twice", None, "inputs of text_encoder: got input_ids, input_ids, accepted input_ids"),
        ("vae_decoder", "more", None, "inputs of vae_decoder: got latent_sample, x, accepted latent_sample"),
    ],
)
def test_fault_48_tensors_that_a_pipeline_does_not_know(
    demo_bundle: Path, name: str, inputs: Any, outputs: Any, message: str
) -> None:
    class Fake:
        def __init__(self, graph: Graph) -> None:
            further = {"twice": graph.inputs, "more": (X,)}
            self.inputs = (*graph.inputs, *further[inputs]) if isinstance(inputs, str) else inputs or graph.inputs
            self.outputs = outputs or graph.outputs
            self.closed = False

        def close(self) -> None:
            self.closed = True

    bundle = Bundle.open(demo_bundle)
    fake = Fake(bundle.component(name).graph())
    backend = OwnBackend(bundle)
    backend.engine = lambda *_: fake  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(BundleError, match=rf"^{name}/model\.onnx: {message}$"):
        Engines(bundle, [backend]).engine(name)
    assert fake.closed


@pytest.mark.parametrize(
    "tensor",
    [
        {"name": ["x"], "dtype": "float32", "shape": [1]},
        {"name": None, "dtype": "float32", "shape": [1]},
        {"name": "x", "dtype": ["float32"], "shape": [1]},
        {"name": "x", "dtype": "string", "shape": [1]},
        {"name": "x", "dtype": "float32", "shape": "123"},
        {"name": "x", "dtype": "float32", "shape": {"a": 1}},
        {"name": "x", "dtype": "float32", "shape": [True]},
        {"name": "x", "dtype": "float32", "shape": [-1]},
        {"name": "x", "dtype": "float32", "shape": [0]},
        {"name": "x", "dtype": "float32", "shape": [1.5]},
        {"name": "x", "dtype": "float32", "shape": [["b", 1, 2]]},
        {"name": "x", "dtype": "float32", "shape": [["b", 1, 2.5, 3]]},
        {"name": "x", "dtype": "float32", "shape": [[1, 1, 1, 1]]},
        {"name": "x", "dtype": "float32", "shape": [["b", 3, 2, 1]]},
        {"name": "x", "dtype": "float32"},
        ["x", "float32", [1]],
        "x",
        None,
    ],
)
def test_fault_48_tensors_that_are_none_in_a_manifest(tmp_path: Path, tensor: Any) -> None:
    root = small_bundle(tmp_path / "bundle")
    document = json.loads((root / MANIFEST).read_text())
    document["components"]["unet"]["graphs"]["plain"]["inputs"] = [tensor]
    (root / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(
        BundleError, match=r"^bundle .*(components\.unet\.graphs\.plain\.inputs\[0\]|tensor 'x'|axis b)"
    ):
        Bundle.open(root)


@pytest.mark.parametrize("index", [602, 1 << 23, 1 << 40, 10**30, -1])
def test_fault_48_token_ids_that_the_text_encoder_has_no_embedding_for(
    copied: Path, index: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer/vocab.json", "tokenizer/tokenizer.json"):
        document = json.loads((copied / name).read_text())
        table = document["model"]["vocab"] if "model" in document else document
        table["star</w>"] = index
        (copied / name).write_text(json.dumps(document))
    record(copied, "tokenizer/vocab.json", "tokenizer/tokenizer.json")
    with pytest.raises(BundleError, match=rf"(tokenizer\.json: token id|id of 'star</w>'): got {index}, accepted 0 … "):
        Pipeline.load(copied, device="cpu")
    assert main([PROMPT, "--model", str(copied), "--device", "cpu"]) == 1
    assert "Error" not in capsys.readouterr().err


@pytest.mark.parametrize("config", [{"vocab_size": 0}, {"vocab_size": "many"}, {"vocab_size": True}, []])
def test_fault_48_a_config_without_a_size(copied: Path, config: Any) -> None:
    (copied / "text_encoder/config.json").write_text(json.dumps(config))
    record(copied, "text_encoder/config.json")
    with pytest.raises(BundleError, match=r"^text_encoder/config\.json: vocab_size: got "):
        Pipeline.load(copied, device="cpu")


# ---- 14: graphs that are none ----------------------------------------------------------------------------------------


def spoilt(change: Callable[[onnx.ModelProto], object]) -> bytes:
    made = model(external())
    change(made)
    return made.SerializeToString()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (b"", r"^unet/model\.onnx is not an ONNX model: got 0 bytes without a graph"),
        (b"not onnx at all", r"^unet/model\.onnx is not an ONNX model: got no field at byte"),
        (model(external()).SerializeToString()[:-20], r"^unet/model\.onnx is not an ONNX model: got no field"),
        (
            spoilt(lambda made: setattr(made.opset_import[0], "version", 999)),
            r"^cannot load unet/model\.onnx: .*Opset 999 .* is till opset \d+",
        ),
        (
            spoilt(lambda made: setattr(made, "ir_version", 99)),
            r"^cannot load unet/model\.onnx: .*Unsupported model IR version: 99, max supported IR version: \d+",
        ),
        (
            spoilt(lambda made: setattr(made.graph.node[0], "op_type", "Nothing")),
            r"^cannot load unet/model\.onnx: .*Nothing",
        ),
        (
            spoilt(
                lambda made: setattr(made.graph.output[0], "name", "z") or made.graph.node[0].output.__setitem__(0, "z")
            ),
            r"^unet/model\.onnx: outputs differ from the manifest: got z tensor\(float\), accepted y tensor\(float\)",
        ),
        (
            spoilt(
                lambda made: setattr(made.graph.input[0], "name", "z") or made.graph.node[0].input.__setitem__(0, "z")
            ),
            r"^unet/model\.onnx: inputs differ from the manifest: got z tensor\(float\), accepted x tensor\(float\)",
        ),
    ],
)
def test_fault_14_graphs_that_do_not_load(tmp_path: Path, graph: bytes, message: str) -> None:
    with pytest.raises((BundleError, EngineError), match=message):
        small_engine(small_bundle(tmp_path / "bundle", graph))


def test_fault_14_weights_that_do_not_fit_their_tensor(tmp_path: Path) -> None:
    made = model(external(length="8"))
    with pytest.raises(EngineError, match=r"^cannot load unet/model\.onnx: "):
        small_engine(small_bundle(tmp_path / "bundle", made.SerializeToString()))


def test_fault_14_weights_inside_the_graph_are_fine(tmp_path: Path) -> None:
    made = model(numpy_helper.from_array(WEIGHTS, "w"))
    engine = small_engine(small_bundle(tmp_path / "bundle", made.SerializeToString()))
    np.testing.assert_array_equal(engine.run({"x": ONES})["y"], ONES @ WEIGHTS)


# ---- 22, 27, 29, 52: at the wrong time -------------------------------------------------------------------------------


def test_fault_22_memory_runs_out_on_the_cpu_and_the_next_request_works(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.load(demo_bundle, device="cpu") as pipeline:
        engine: Any = pipeline.engines.engine("unet")
        session = engine._session

        class Full:
            def run(self, *_: object) -> None:
                raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for 8 bytes")

        engine._session = Full()
        with pytest.raises(
            OutOfMemoryError, match=r"^unet/model_cpu\.onnx failed while running: out of memory .*; use a"
        ):
            pipeline(PROMPT, seed=1, num_inference_steps=1)
        engine._session = session
        assert pipeline(PROMPT, seed=1, num_inference_steps=1).images


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that it is multi-threaded: Python 3.12
def test_fault_27_a_pipeline_used_after_fork(demo_bundle: Path) -> None:
    """A child has none of the session's threads: it would wait for them for ever, or draw by chance."""
    with Pipeline.load(demo_bundle, device="cpu") as pipeline:
        expected = pipeline(PROMPT, seed=1, num_inference_steps=1)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # no assertion here: pytest would go on twice
            try:
                pipeline(PROMPT, seed=1, num_inference_steps=1)
                said = "it drew"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writing, said.encode())
            os._exit(0)
        os.waitpid(child, 0)
        said = os.read(reading, 1000).decode()
        os.close(reading)
        os.close(writing)
        assert said == (
            "EngineError: text_encoder/model_cpu.onnx was loaded before this process forked; "
            "load the pipeline after fork"
        )
        again = pipeline(PROMPT, seed=1, num_inference_steps=1)
        assert np.array_equal(again.latents, expected.latents)


def test_fault_29_a_dropped_generation_runs_no_further_step(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    own = OwnBackend(bundle)
    with Pipeline.load(bundle, backends=[own]) as pipeline:
        request = pipeline(PROMPT, seed=1, num_inference_steps=2).request
        own.calls.clear()
        generation = pipeline.start(replace(request, num_inference_steps=20))
        for step in generation:
            if step.index == 2:
                break
        generation.stop()
        assert own.calls["unet"] == 3 and list(generation) == []
        own.calls.clear()
        generation = pipeline.start(replace(request, num_inference_steps=20))
        next(generation)
        del generation
        assert own.calls["unet"] == 1
        own.calls.clear()
        stopped = pipeline(PROMPT, seed=1, num_inference_steps=20, callback=lambda step: step.index < 4)
        assert own.calls["unet"] == 5 and stopped.parameters[0].extra["Stopped after"].startswith("5 of")


def test_fault_52_closed_while_it_draws(demo_bundle: Path) -> None:
    """The step under way ends; the next is refused; nothing hangs, in whatever order."""
    pipeline = Pipeline.load(demo_bundle, device="cpu")
    expected = pipeline(PROMPT, seed=1, num_inference_steps=1)
    errors: list[BaseException] = []
    steps = threading.Semaphore(0)

    def draw() -> None:
        try:
            pipeline(PROMPT, seed=1, num_inference_steps=500, callback=lambda _: steps.release())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        assert steps.acquire(timeout=60)
    pipeline.close()
    pipeline.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [str(error) for error in errors] == ["the pipeline was closed"] * 2
    assert all(isinstance(error, EngineError) for error in errors)
    with pytest.raises(EngineError, match="the pipeline was closed"):
        pipeline(PROMPT)
    assert expected.images


def test_fault_52_closed_before_the_picture_is_decoded(demo_bundle: Path) -> None:
    pipeline = Pipeline.load(demo_bundle, device="cpu")
    generation = pipeline.start(pipeline(PROMPT, seed=1, num_inference_steps=1).request)
    next(generation)
    pipeline.close()
    with pytest.raises(EngineError, match="the pipeline was closed"):
        generation.result()
