"""ONNX Runtime as an engine: the CPU and CUDA providers, weights memory-mapped from the bundle.

The graph's bytes come verified from the bundle; its weights stay in their .safetensors, which ONNX Runtime maps into
memory, so that a second process shares the pages.  Pre-packing copies every weight into a private, re-ordered buffer:
10 % faster, but seconds of loading and gigabytes of private memory at Stable Diffusion's size: only
small models get it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DependencyError, EngineError, OutOfMemoryError, UsageError, one_line
from ..tensor import Array, FeedCheck, TensorSpec, check_feeds
from .binding import BoundLaunch, OnnxRuntimeDevice, OrtTensor
from .device import DeviceTensor
from .protocol import Feed, Placed

Device = Literal["cpu", "cuda"]

PREPACK_LIMIT = 64 << 20  # bytes of weights up to which pre-packing costs too little to matter


def import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            "no engine library is installed",
            accepted="onnxruntime or onnxruntime-gpu",
            remedy='pip install "sd-lean[cpu]" (or "sd-lean[gpu]" for CUDA)',
        ) from error
    onnxruntime.set_default_logger_severity(3)  # errors only: warnings about provider placement are not for users
    return onnxruntime


def choose_device(wanted: str) -> Device:
    """`auto` → "cuda" where ONNX Runtime has the CUDA provider, else "cpu".  DependencyError: "cuda" cannot be had."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UsageError("device", got=wanted, accepted="auto, cpu, cuda")
    if wanted == "cpu":
        return "cpu"
    available = import_onnxruntime().get_available_providers()
    if "CUDAExecutionProvider" in available:
        return "cuda"
    if wanted == "cuda":
        raise DependencyError(
            "device cuda: this ONNX Runtime has no CUDA provider",
            got=", ".join(available),
            remedy='pip uninstall onnxruntime, then pip install "sd-lean[gpu]"',
        )
    return "cpu"


class OnnxRuntimeEngine:
    """One graph in one ONNX Runtime session; see `Engine` for the contract."""

    def __init__(
        self,
        graph: bytes,
        folder: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        device: Device = "cpu",
        weights_size: int = 0,
        float16: bool = False,
        threads: int | None = None,
    ) -> None:
        """`graph`: the .onnx bytes; `folder`: where the weights it refers to lie, of `weights_size` bytes, and whether
        they are `float16`."""
        self._ort = import_onnxruntime()
        self._inputs, self._outputs, self._device = inputs, outputs, device
        self._check = FeedCheck(inputs)
        options = _session_options(self._ort, folder, prepack=weights_size <= PREPACK_LIMIT, threads=threads)
        options.enable_cpu_mem_arena = not float16  # it would keep what is widened for each call: every weight
        try:
            self._session = self._ort.InferenceSession(graph, options, providers=_providers(self._ort, device))
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise translate(error, f"cannot load the graph in {folder}") from error
        if device == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise EngineError(
                "device cuda: ONNX Runtime fell back to the CPU: its CUDA libraries do not load",
                remedy="install CUDA and cuDNN of the versions that onnxruntime-gpu names, or use --device cpu",
            )
        self._check_signature()

    def _check_signature(self) -> None:
        for kind, specs, nodes in (
            ("inputs", self._inputs, self._session.get_inputs()),
            ("outputs", self._outputs, self._session.get_outputs()),
        ):
            declared, actual = {s.name for s in specs}, {n.name for n in nodes}
            if declared - actual or (kind == "inputs" and declared != actual):
                raise EngineError(
                    f"graph {kind} differ from the manifest",
                    got=", ".join(sorted(actual)),
                    accepted=", ".join(sorted(declared)),
                )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def device(self) -> OnnxRuntimeDevice:
        return OnnxRuntimeDevice(self._device)

    def tensor(self, name: str, shape: tuple[int, ...]) -> OrtTensor:
        spec = next(spec for spec in (*self._inputs, *self._outputs) if spec.name == name)
        return OrtTensor(self._ort, np.zeros(shape, spec.dtype), self._device)

    def prepare(self, tensors: Mapping[str, DeviceTensor]) -> BoundLaunch:
        check_feeds(self._inputs, {spec.name: tensors[spec.name] for spec in self._inputs})
        return BoundLaunch(self._session, tensors, [spec.name for spec in self._inputs], translate)

    def place(self, name: str, array: Array) -> Feed:
        """`array` for input `name` where the graph reads it: itself on the CPU, a copy on the GPU."""
        next(spec for spec in self._inputs if spec.name == name).check(array)
        if self._device == "cpu":
            return array
        value = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
        return Placed(value, array.shape, array.dtype)

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        self._check(feeds)
        names = [spec.name for spec in self._outputs]
        try:
            run = self._run_plain if self._device == "cpu" else self._run_bound
            results = run(feeds, names)
        except Exception as error:
            raise translate(error, "the engine failed while running") from error
        return dict(zip(names, results, strict=True))

    def _run_plain(self, feeds: Mapping[str, Feed], names: list[str]) -> list[Array]:
        results: list[Array] = self._session.run(names, dict(feeds))
        return results

    def _run_bound(self, feeds: Mapping[str, Feed], names: list[str]) -> list[Array]:
        """IO binding: placed inputs stay on the GPU, the others and the outputs are copied once each."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, Placed):
                binding.bind_ortvalue_input(name, value.value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        results: list[Array] = binding.copy_outputs_to_cpu()
        return results

    def close(self) -> None:
        """Release the session and its memory; `run` must not be called afterwards."""
        del self._session


def _session_options(ort: Any, folder: Path, *, prepack: bool, threads: int | None) -> Any:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel  # ALL also re-orders weights for the processor: a seventh faster, and private
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if prepack else levels.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning steals shared cores
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _providers(ort: Any, device: Device) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA libraries of the nvidia-* wheels
    options = {"prefer_nhwc": "1", "use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"}  # sums in float32
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def translate(error: Exception, what: str) -> EngineError:
    """What ONNX Runtime raised, as ours."""
    text = str(error)
    if isinstance(error, EngineError):
        return error
    signs = ("out of memory", "Failed to allocate", "bad allocation")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return OutOfMemoryError(
            f"{what}: out of memory ({one_line(text, 160)})", remedy="use a smaller batch or picture size"
        )
    return EngineError(f"{what}: {one_line(text, 300)}")
