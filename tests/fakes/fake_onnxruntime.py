"""ONNX Runtime's CUDA provider made of its CPU provider, on the fake GPU: sessions, IO binding, the stream it is given.

Like the real one it queues its work on that stream, waits for it unless the run's options say otherwise, and may be
captured only if it does not wait, and not in its first two runs of a shape, in which it takes memory.  Operators that
only the CUDA provider has are replaced by their definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_cuda import FakeGpu
from runnable import with_functions
from sd_runtime.engines.onnxruntime_ import cuda as onnxruntime_cuda

# What ONNX Runtime 1.31 says
NO_CUDNN = (
    "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Non-zero status code returned while running Conv node. Name:'' "
    "Status Message: /onnxruntime_src/onnxruntime/core/providers/cuda/cuda_kernel.h:296 static cudnnContext* "
    "onnxruntime::cuda::CudaKernel::RequireCudnnHandle(cudnnHandle_t) [ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : "
    "cuDNN is unavailable or disabled for CUDA Execution Provider: dlopen failed for libcudnn.so: libcudnn.so: "
    "cannot open shared object file"
)
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class FakeOnnxRuntime:
    """The installed ONNX Runtime as a build for GPUs; the CPU provider stays as it is."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.sessions = gpu, 0
        self.tf32: dict[str, str] = {}  # of sessions, by the first output
        self.loads = True  # whether its CUDA libraries can be loaded
        self.no_cudnn = False
        self._real = onnxruntime.InferenceSession

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
        onnxruntime_cuda._load_cuda_libraries.cache_clear()
        monkeypatch.setattr(onnxruntime, "InferenceSession", self._open)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
        return self

    def _probe(self, *given: Any) -> None:
        if self.no_cudnn:
            raise RuntimeError(NO_CUDNN)

    def _open(self, graph: bytes, options: Any, providers: Sequence[Any]) -> Any:
        if providers == [CPU] or not self.loads:
            return self._real(graph, options, providers=[CPU])
        if providers == [CUDA]:  # whether it works at all
            return SimpleNamespace(get_providers=lambda: [CUDA, CPU], run=self._probe)
        (name, given), rest = providers
        assert name == CUDA and rest == CPU
        assert given.get("enable_cuda_graph", "0") == "0", "two libraries would capture one stream"
        self.sessions += 1
        session = self._real(with_functions(graph), options, providers=[CPU])
        self.tf32[session.get_outputs()[0].name] = given["use_tf32"]
        return FakeSession(self, session, int(given["user_compute_stream"]))


class FakeSession:
    def __init__(self, runtime: FakeOnnxRuntime, session: Any, stream: int) -> None:
        self._runtime, self._session, self._stream = runtime, session, stream
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self._runtime.gpu)

    def run_with_iobinding(self, binding: FakeBinding, options: Any = None) -> None:
        stream = self._runtime.gpu.streams[self._stream]
        if stream.capturing and binding.runs < 2:
            raise RuntimeError(
                "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: operation not permitted when stream is capturing"
            )
        binding.runs += 1
        names = [node.name for node in self._session.get_outputs() if node.name in binding.outputs]

        def work() -> None:
            feeds = {name: read() for name, read in binding.inputs.items()}
            for name, result in zip(names, self._session.run(names, feeds), strict=True):
                binding.outputs[name](result)

        stream.queue(f"run {','.join(names)}", work)
        waits = options is None or options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
        if waits:
            stream.sync()

    def __del__(self) -> None:
        self._runtime.sessions -= 1


class FakeBinding:
    """Where a run reads and writes: on the GPU at addresses chosen once, or on the host."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu, self.runs = gpu, 0
        self.inputs: dict[str, Callable[[], np.ndarray]] = {}
        self.outputs: dict[str, Callable[[np.ndarray], None]] = {}
        self._results: dict[str, np.ndarray] = {}

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: type, shape: list[int], buffer_ptr: int
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        memory = self._view(element_type, shape, buffer_ptr)
        self.inputs[name] = lambda: memory().copy()

    def bind_cpu_input(self, name: str, arr_on_cpu: np.ndarray) -> None:
        assert arr_on_cpu.flags.c_contiguous
        copied = arr_on_cpu.copy()
        self.inputs[name] = lambda: copied

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: type | None = None,
        shape: list[int] | None = None,
        buffer_ptr: int | None = None,
    ) -> None:
        assert device_id == 0
        if device_type == "cpu":
            assert buffer_ptr is None
            self.outputs[name] = lambda result: self._results.update({name: result})
            return
        assert device_type == "cuda" and element_type is not None and shape is not None and buffer_ptr is not None
        memory = self._view(element_type, shape, buffer_ptr)

        def write(result: np.ndarray) -> None:
            assert list(result.shape) == shape, "the output has another shape than it was bound to"
            memory()[...] = result

        self.outputs[name] = write

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        return [self._results[name] for name in self.outputs]

    def _view(self, element_type: type, shape: list[int], address: int) -> Callable[[], np.ndarray]:
        dtype = np.dtype(element_type)
        size = int(np.prod(shape)) * dtype.itemsize
        return lambda: self._gpu.memory.bytes_at(address, size).view(dtype).reshape(shape)
