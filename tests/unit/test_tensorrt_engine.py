"""TensorRT engines on a fake GPU: results, memory, versions, and every way in which they fail."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_cuda import CUDAError, FakeGpu
from sd_runtime.bundle.manifest import Graph, ShapeRange, Target
from sd_runtime.engines.device import DeviceEngine
from sd_runtime.engines.gpu import gpu as cuda
from sd_runtime.engines.gpu.gpu import WARM_UP_RUNS, Gpu
from sd_runtime.engines.protocol import Placed
from sd_runtime.engines.tensorrt_.library import TensorRT, current_target
from sd_runtime.errors import DependencyError, EngineError, OutOfMemoryError
from sd_runtime.tensor import Array, Dim, TensorSpec
from tensorrt_rig import Rig, exact_range, onnxruntime_unet, rig, unet_shapes, version, whole_range
from tiny_graphs import parsed, unet_signature

__all__ = ["rig", "version"]  # fixtures
newest = pytest.mark.parametrize("version", ["11.4.0"])


def feeds(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def expected(values: dict[str, Array]) -> Array:
    return onnxruntime_unet().run(values)["out_sample"]


# ---- results ---------------------------------------------------------------------------------------------------------


def test_runs_as_onnxruntime_does_at_every_shape(rig: Rig) -> None:
    engine = rig.unet()
    assert isinstance(engine, DeviceEngine)
    for seed, shapes in enumerate((unet_shapes(2), unet_shapes(1, 16, 4), unet_shapes(2), unet_shapes(8, 4, 5, 14))):
        values = feeds(shapes, seed)
        np.testing.assert_array_equal(engine.run(values)["out_sample"], expected(values))


def test_results_belong_to_the_caller(rig: Rig) -> None:
    engine = rig.unet()
    first = [engine.run(feeds(unet_shapes(2), seed))["out_sample"] for seed in range(5)]
    again = [engine.run(feeds(unet_shapes(2), seed))["out_sample"] for seed in range(5)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_inputs_placed_once_serve_several_runs(rig: Rig) -> None:
    engine, values = rig.unet(), feeds(unet_shapes(2))
    placed = engine.place("encoder_hidden_states", values["encoder_hidden_states"])
    assert isinstance(placed, Placed)
    for seed in range(3):
        sample = feeds(unet_shapes(2), seed)["sample"]
        got = engine.run(values | {"sample": sample, "encoder_hidden_states": placed})["out_sample"]
        np.testing.assert_array_equal(got, expected(values | {"sample": sample}))


def test_int64_inputs_where_tensorrt_has_only_int32(rig: Rig) -> None:
    model = parsed("""
        <ir_version: 8, opset_import: ["": 17]>
        encoder (int64[B, 3] input_ids) => (float[B, 3] doubled)
        <int64[1] two = {2}>
        { twice = Mul(input_ids, two)  doubled = Cast<to = 1>(twice) }
    """)
    batch = Dim("batch", 1, 1, 4)
    graph = Graph(
        "e.onnx", (TensorSpec("input_ids", "int64", (batch, 3)),), (TensorSpec("doubled", "float32", (batch, 3)),)
    )
    record = rig.record("text_encoder", "plain", rig.save("encoder", model), whole_range(graph.inputs))
    got = rig.engine(graph, record).run({"input_ids": np.array([[1, 49406, 49407]])})["doubled"]
    assert got.tolist() == [[2, 98812, 98814]]


def test_two_threads_get_what_one_gets(rig: Rig) -> None:
    engine = rig.unet()
    wanted = [expected(feeds(unet_shapes(1 + seed % 2), seed)) for seed in range(20)]
    got: list[Array | None] = [None] * 20

    def work(first: int) -> None:
        for seed in range(first, 20, 2):
            got[seed] = engine.run(feeds(unet_shapes(1 + seed % 2), seed))["out_sample"]

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


# ---- choice of the engine --------------------------------------------------------------------------------------------


@newest
def test_exact_engines_are_preferred_and_loaded_when_needed(rig: Rig) -> None:
    graph = unet_signature()
    engine = rig.unet(whole_range(graph.inputs), exact_range(unet_shapes(4)), exact_range(unet_shapes(2)))
    assert len(rig.fake.engines) == 1
    engine.run(feeds(unet_shapes(2)))
    engine.run(feeds(unet_shapes(4)))
    assert [e.profile["sample"][0][0] for e in rig.fake.engines] == [4, 2]
    engine.run(feeds(unet_shapes(3)))
    assert [e.profile["sample"] for e in rig.fake.engines][2] == [(1, 4, 4, 4), (2, 4, 8, 8), (8, 4, 16, 16)]


@newest
def test_of_exact_engines_the_first_listed_is_loaded_first(rig: Rig) -> None:
    rig.unet(whole_range(unet_signature().inputs), *(exact_range(unet_shapes(rows)) for rows in (4, 2, 8)))
    assert [e.profile["sample"][0][0] for e in rig.fake.engines] == [4]


@newest
def test_shapes_that_no_engine_takes(rig: Rig) -> None:
    narrow = {"sample": ShapeRange((1, 4, 8, 8), (2, 4, 8, 8), (2, 4, 16, 8))}
    narrow["encoder_hidden_states"] = ShapeRange((1, 7, 8), (2, 7, 8), (2, 7, 8))
    engine = rig.unet(narrow, exact_range(unet_shapes(4, 8, 8)))
    assert str(engine.inputs[0].shape[0]) == "1..4"
    message = (
        r"no TensorRT engine of unet was built for these shapes: got sample\(3, 4, 8, 8\).*, "
        r"accepted sample\(4, 4, 8, 8\).* or sample\(1\.\.2, 4, 8\.\.16, 8\).*; .*sd-export build bundle"
    )
    with pytest.raises(EngineError, match=message):
        engine.run(feeds(unet_shapes(3, 8, 8)))
    with pytest.raises(EngineError, match=r"input 'sample': got float32\(5, 4, 8, 8\)"):
        engine.run(feeds(unet_shapes(5, 8, 8)))


@newest
@pytest.mark.parametrize("way", ["run", "prepare"])
def test_others_take_their_turn_while_an_engine_is_read(rig: Rig, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    engine = rig.unet(exact_range(unet_shapes(2)), exact_range(unet_shapes(4)))
    done = threading.Event()

    def work_of_another() -> None:
        rig.gpu.tensor((1,), np.dtype(np.float32)).close()
        done.set()

    def slow(path: str) -> bytes:
        threading.Thread(target=work_of_another).start()
        assert done.wait(10), "the turn was taken"
        return rig.read(path)

    monkeypatch.setattr(engine, "_read", slow)
    shapes = unet_shapes(4)
    if way == "run":
        engine.run(feeds(shapes))
    else:
        engine.prepare({n: engine.tensor(n, s) for n, s in {**shapes, "out_sample": shapes["sample"]}.items()})
    assert done.is_set()


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_nothing_is_allocated_once_the_shapes_are_known(rig: Rig) -> None:
    engine = rig.unet()
    for rows in (1, 2, 1, 2):  # two of each: there are two pinned buffers each way
        engine.run(feeds(unet_shapes(rows)))
    before, contexts = dict(rig.fake_gpu.memory.allocations), rig.fake.contexts_made
    for rows in (2, 1, 2, 1, 1):
        engine.run(feeds(unet_shapes(rows)))
    assert rig.fake_gpu.memory.allocations == before
    assert rig.fake.contexts_made == contexts


def test_weights_lie_on_the_gpu_once_however_many_contexts(rig: Rig) -> None:
    engine = rig.unet()
    for rows in range(1, 5):
        engine.run(feeds(unet_shapes(rows)))
    assert len(rig.fake.engines) == 1
    assert len(rig.fake.contexts) == (4 if rig.fake.number >= (10, 0) else 1)


def test_engines_share_one_arena(rig: Rig) -> None:
    small, large = rig.unet(activations=1000), rig.unet(activations=50_000)
    values = feeds(unet_shapes(8, 16, 16, 77))
    small.run(values)
    rig.gpu.stream.sync()
    used = rig.fake_gpu.memory.used
    ends = sum(array.nbytes for array in (*values.values(), large.run(values)["out_sample"]))
    rig.gpu.stream.sync()
    assert rig.fake_gpu.memory.used == used - 1000 + 50_000 + ends
    block = rig.gpu.arena.block(0)
    for engine in (small, large, small):
        np.testing.assert_array_equal(engine.run(values)["out_sample"], expected(values))
    assert rig.gpu.arena.block(0) is block


def test_closing_gives_everything_back(rig: Rig) -> None:
    engine = rig.unet()
    for rows in range(1, 8):  # more shapes than are kept
        engine.run(feeds(unet_shapes(rows)))
    engine.close()
    rig.gpu.close()
    rig.fake.engines.clear()
    assert rig.fake_gpu.memory.live == 0
    assert all(stream.closed for stream in rig.fake_gpu.streams.values())
    with pytest.raises(EngineError, match="the GPU was closed; load the pipeline again"):
        engine.run(feeds(unet_shapes(2)))


# ---- failures --------------------------------------------------------------------------------------------------------


def test_fault_10_host_code_in_engines_stays_forbidden(rig: Rig) -> None:
    rig.unet()
    for runtime in rig.fake.runtimes:
        assert getattr(runtime, "engine_host_code_allowed", False) is False


def test_fault_09_an_engine_that_does_not_load_says_why(rig: Rig) -> None:
    rig.fake.damaged = True
    with pytest.raises(
        EngineError, match=r"cannot load the TensorRT engine unet-plain-0\.plan: .*Version tag does not"
    ):
        rig.unet()


@newest
def test_engine_with_other_tensors_than_the_manifest_says(rig: Rig) -> None:
    graph, path = unet_signature(), rig.save("unet", __import__("tiny_graphs").unet_graph())
    record = rig.record("unet", "plain", path, whole_range(graph.inputs))
    missing = replace(graph, inputs=graph.inputs[:2])
    with pytest.raises(EngineError, match=r"inputs of the engine .* got encoder_hidden_states, sample, timestep, acc"):
        rig.engine(missing, record)


def test_fault_22_memory_runs_out_and_the_next_request_works(rig: Rig) -> None:
    engine = rig.unet(activations=1 << 20)
    small, large = feeds(unet_shapes(1, 4, 4)), feeds(unet_shapes(8, 16, 16))
    engine.run(small)
    rig.gpu.stream.sync()
    used = rig.fake_gpu.memory.used
    rig.fake_gpu.memory.capacity = used + 1000
    if rig.fake.number >= (10, 0):
        with pytest.raises(
            OutOfMemoryError, match=r"allocating float32\(8, .* GPU memory ran out .*use a smaller batch"
        ):
            engine.run(large)
        rig.gpu.stream.sync()
        assert rig.fake_gpu.memory.used == used
    np.testing.assert_array_equal(engine.run(small)["out_sample"], expected(small))
    rig.fake_gpu.memory.capacity = 1 << 30
    np.testing.assert_array_equal(engine.run(large)["out_sample"], expected(large))


@newest
def test_fault_22_memory_runs_out_while_loading(rig: Rig) -> None:
    rig.fake_gpu.memory.capacity = 10
    with pytest.raises(OutOfMemoryError, match="loading the TensorRT engine"):
        rig.unet()
    rig.fake_gpu.memory.capacity = 1 << 30
    rig.unet()


@newest
def test_what_tensorrt_logs_becomes_the_cause(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_tensorrt import Context

    def broken(context: Context, stream: int) -> bool:
        context.engine.runtime.error("Error Code 1: Cask (Cask convolution execution)")
        return False

    engine = rig.unet()
    monkeypatch.setattr(Context, "execute_async_v3", broken)
    with pytest.raises(EngineError, match=r"the engine unet-plain-0.plan failed to start: Error Code 1: Cask"):
        engine.run(feeds(unet_shapes(2)))
    with pytest.raises(EngineError, match=r"failed to start: Error Code 1: Cask \(Cask convolution execution\)$"):
        engine.run(feeds(unet_shapes(2)))  # and not the last one's too


def test_fault_25_after_a_fatal_error_the_gpu_is_refused_and_a_fresh_one_works(rig: Rig) -> None:
    engine, values = rig.unet(), feeds(unet_shapes(2))

    def illegal(what: str) -> None:
        if what.startswith("enqueue"):
            raise CUDAError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    rig.fake_gpu.fail = illegal
    with pytest.raises(EngineError, match="the GPU failed while running: CUDA_ERROR_ILLEGAL_ADDRESS"):
        engine.run(values)
    rig.fake_gpu.fail = lambda what: None
    with pytest.raises(EngineError, match=r"the GPU is unusable since: CUDA_ERROR_ILLEGAL.*restart the process"):
        engine.run(values)
    engine.close()
    rig.fake_gpu.mend()
    fresh = Rig(rig.folder, rig.version, rig.fake_gpu, rig.fake)
    np.testing.assert_array_equal(fresh.unet().run(values)["out_sample"], expected(values))


@newest
def test_fault_27_a_forked_child_is_told(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.unet()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(EngineError, match=r"opened before this process forked; load the pipeline after fork"):
        engine.run(feeds(unet_shapes(2)))


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match=r"TensorRT does not load .*sd-lean\[tensorrt\]"):
        TensorRT()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(DependencyError, match=r"cuda\.core is not installed"):
        Gpu()


@pytest.mark.skipif("STUB_CUDA" in os.environ, reason="there is a driver")
def test_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu().install(monkeypatch)

    def no_driver(self: Any) -> None:
        raise RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search.')

    monkeypatch.setattr("fake_cuda.Device.set_current", no_driver)
    with pytest.raises(EngineError, match=r"no usable NVIDIA GPU: .*NVIDIA driver library"):
        Gpu()
    assert not gpu.streams


# ---- the fake itself, and what it would find -------------------------------------------------------------------------


@newest
def test_reading_before_waiting_finds_poison(rig: Rig) -> None:
    tensor = rig.gpu.tensor((2, 3), np.dtype(np.float32))
    tensor.write(np.ones((2, 3), np.float32))
    pending = tensor.read()
    assert np.isnan(pending._slot.array).all()
    assert (pending.wait() == 1).all()


@newest
def test_an_array_may_be_changed_as_soon_as_it_is_written(rig: Rig) -> None:
    tensor, pending = rig.gpu.tensor((4,), np.dtype(np.float32)), []
    for value in range(6):  # more than there are pinned buffers
        array = np.full(4, value, np.float32)
        tensor.write(array)
        array[:] = -1
        pending.append(tensor.read())
        if value:
            assert (pending[value - 1].wait() == value - 1).all()


def test_without_a_gpu_tensorrt_says_so(rig: Rig) -> None:
    rig.fake.starts = False
    with pytest.raises(EngineError, match=r"^TensorRT does not start: CUDA initialization failure with error: 35"):
        TensorRT()


def test_target_names_this_machine(rig: Rig) -> None:
    target = Target("NVIDIA H200", "9.0", rig.version, "13.0", "580.65.6")
    assert current_target(rig.library, rig.gpu) == target


def test_target_without_nvml_knows_all_but_the_driver(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[int, ...]:
        raise RuntimeError('"nvml" is an NVIDIA driver library and can only be found via system search.')

    monkeypatch.setattr(sys.modules["cuda.core.system"], "get_kernel_mode_driver_version", missing)
    target = current_target(rig.library, rig.gpu)
    assert (target.cuda, target.driver) == ("13.0", "unknown")


@newest
def test_what_spoils_a_recording_is_named_and_work_goes_on(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    tensor, runs = rig.gpu.tensor((2,), np.dtype(np.float32)), []

    class Waits:
        recordable = True

        def __call__(self) -> None:
            runs.append(tensor.read(1))
            if len(runs) > WARM_UP_RUNS:
                rig.gpu.stream.sync()

        def close(self) -> None: ...

    launch = rig.gpu.record([Waits()])
    assert "recording a CUDA graph: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: " in caplog.records[0].getMessage()
    other = rig.gpu.tensor((2,), np.dtype(np.float32))
    other.write(np.ones(2, np.float32))
    assert (other.read().wait() == 1).all()
    launch.close()


def test_errors_are_told_apart() -> None:
    assert isinstance(cuda.failure("x", "Error Code 2: OutOfMemory (Requested size was 7 bytes.)"), OutOfMemoryError)
    assert isinstance(cuda.failure("x", "CUDA_ERROR_OUT_OF_MEMORY: ..."), OutOfMemoryError)
    assert not isinstance(cuda.failure("x", "Error Code 1: Myelin"), OutOfMemoryError)
