"""ONNX Runtime's CUDA provider as an engine on a `Gpu`: its memory, its stream, its recordings.

A session is given the `Gpu`'s stream and told not to wait for its own work, so that it queues kernels like any other
engine, and what it queues on tensors chosen once (IO binding) can be recorded as a part of a CUDA graph.  For that its
graphs must not copy between GPU and host: see sd_export.graphs.forms.cuda.  Memory for intermediate values is its own;
it takes it on the first run of a shape.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.bundle import GraphFiles
from ...errors import DependencyError
from ...tensor import Array, FeedCheck, TensorSpec, check_feeds, check_outputs
from ..causes import shortened
from ..device import DeviceTensor, placed
from ..gpu.gpu import Gpu
from ..gpu.memory import GpuTensor, on_gpu
from ..protocol import Feed, Placed
from .installation import check_cuda_major
from .library import CPU, CUDA, SILENT, import_onnxruntime, open_session

OPTIONS = {
    "enable_skip_layer_norm_strict_mode": "1",  # sums in float32
    "arena_extend_strategy": "kSameAsRequested",  # not twice as much each time
    "cudnn_conv_algo_search": "HEURISTIC",  # what is chosen by time may differ, and round differently, in each process
}
# y = conv(x, w), both (1, 1, 3, 3): an ONNX graph to see whether CUDA and cuDNN work at all
PROBE = bytes.fromhex(
    "08073a6b0a0f0a01780a01771201792204436f6e761201675a1b0a017812160a14080112100a0208010a0208010a0208030a0208035a1b"
    "0a017712160a14080112100a0208010a0208010a0208030a020803621b0a017912160a14080112100a0208010a0208010a0208010a0208"
    "0142040a00100d"
)


LOADING = threading.Lock()


def check_driver() -> None:
    """DependencyError: the driver is for an older CUDA than this ONNX Runtime is built for."""
    try:
        from cuda.bindings.driver import cuDriverGetVersion
    except ImportError:  # without it there is no GPU to open either, which says what is missing
        return
    _, version = cuDriverGetVersion()
    if version:  # 0: there is no driver
        check_cuda_major(int(version))


def load_cuda_libraries() -> None:
    """CUDA's and cuDNN's, of nvidia-* wheels anywhere on Python's path or of the system.  DependencyError: they do not
    work; without CUDA's, ONNX Runtime falls back to the CPU and logs it at most, without cuDNN's it fails later."""
    with LOADING:
        _load_cuda_libraries()


@cache
def _load_cuda_libraries() -> None:
    ort, said = import_onnxruntime(), io.StringIO()
    if hasattr(ort, "preload_dlls"):
        for folder in sorted({str(lib) for entry in sys.path for lib in Path(entry).glob("nvidia/*/lib")}):
            with redirect_stdout(io.StringIO()):  # each folder has but a part of them
                ort.preload_dlls(directory=folder)
        with redirect_stdout(said):
            ort.preload_dlls()
    works, why = _probe(ort)
    if not works:
        failures = [line for line in said.getvalue().splitlines() if line.startswith("Failed")]
        why = shortened(why or "; ".join(failures)) or "it does not say why"
        raise DependencyError(
            f"device cuda: ONNX Runtime cannot use CUDA and cuDNN here ({why})",
            remedy='pip install "sd-lean[gpu]" ("sd-lean[gpu-cu12]" for CUDA 12), or choose the CPU as `device`',
        )


def _probe(ort: Any) -> tuple[bool, str]:
    """Whether a convolution runs on the GPU, and what ONNX Runtime says if not."""
    options, ones = ort.SessionOptions(), np.ones((1, 1, 3, 3), np.float32)
    options.log_severity_level = SILENT
    try:
        session = ort.InferenceSession(PROBE, options, providers=[CUDA])
        session.run(None, {"x": ones, "w": ones})
    except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
        return False, str(error)
    return session.get_providers()[0] == CUDA, ""


class OnnxRuntimeCudaEngine:
    """One graph in one session on the GPU; see `Engine` and `DeviceEngine`."""

    def __init__(
        self,
        gpu: Gpu,
        files: GraphFiles,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        float16: bool = False,
    ) -> None:
        """`float16`: whether the weights are.

        EngineError: the graph does not load; BundleError: the weights are not those that were verified;
        DependencyError: CUDA's libraries do not load."""
        self.device, self.inputs, self.outputs = gpu, inputs, outputs
        self._name = files.name
        self._check = FeedCheck(inputs)
        load_cuda_libraries()
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        # Without TF32, ONNX Runtime forbids cuDNN its tensor cores altogether, to float16 convolutions too.  With it,
        # what is float32 in a float16 network is rounded in products as float16 is.
        own = {"use_tf32": "1" if float16 else "0", "user_compute_stream": str(int(gpu.stream.handle))}
        provider = (CUDA, OPTIONS | own)
        self._session = open_session(files, inputs, outputs, options, [provider, CPU])

    def tensor(self, name: str, shape: tuple[int, ...]) -> GpuTensor:
        spec = next(spec for spec in (*self.inputs, *self.outputs) if spec.name == name)
        return self.device.tensor(shape, np.dtype(spec.dtype))

    def prepare(self, tensors: Mapping[str, DeviceTensor]) -> BoundLaunch:
        check_feeds(self.inputs, {spec.name: tensors[spec.name] for spec in self.inputs})
        return BoundLaunch(self.device, self._session, on_gpu(tensors), {spec.name for spec in self.inputs})

    def place(self, name: str, array: Array) -> Feed:
        return placed(self, name, array)

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        """Placed inputs are read where they are, the others and the outputs copied once each."""
        self._check(feeds)
        names = [spec.name for spec in self.outputs]
        with self.device.turn("running a graph"):
            binding = self._session.io_binding()
            for name, feed in feeds.items():
                if isinstance(feed, Placed):
                    bind(binding.bind_input, name, feed.value)
                else:
                    binding.bind_cpu_input(name, np.ascontiguousarray(feed))
            for name in names:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            results: list[Array] = binding.copy_outputs_to_cpu()
        found = dict(zip(names, results, strict=True))
        check_outputs(self._name, self.inputs, feeds, self.outputs, found)
        return found

    def close(self) -> None:
        """Release the session and its memory, once the GPU is done with it; no use afterwards."""
        with self.device.closing():
            self.device.stream.sync()
            del self._session


class BoundLaunch:
    """A session's run on tensors chosen once; see `Launch`."""

    recordable = True

    def __init__(self, gpu: Gpu, session: Any, tensors: Mapping[str, GpuTensor], inputs: set[str]) -> None:
        self._gpu, self._session, self._binding = gpu, session, session.io_binding()
        for name, tensor in tensors.items():
            bind(self._binding.bind_input if name in inputs else self._binding.bind_output, name, tensor)
        self._options = import_onnxruntime().RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def __call__(self) -> None:
        with self._gpu.turn("running a graph"):
            self._session.run_with_iobinding(self._binding, self._options)

    def close(self) -> None:
        del self._binding, self._session


def bind(method: Any, name: str, tensor: GpuTensor) -> None:
    """Let a session read or write a tensor in the GPU's memory."""
    method(name, "cuda", 0, tensor.dtype.type, list(tensor.shape), tensor.address)
