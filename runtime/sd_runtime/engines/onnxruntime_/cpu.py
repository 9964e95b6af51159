"""ONNX Runtime as an engine on the CPU, weights memory-mapped from the bundle; its sessions for the GPU, too.

The graph's bytes come verified from the bundle; its weights stay in their .safetensors, which ONNX Runtime maps into
memory, so that a second process shares the pages.  Pre-packing copies every weight into a private, re-ordered buffer:
10 % faster, but seconds of loading and gigabytes of private memory at Stable Diffusion's size: only
small models get it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import DependencyError, EngineError, OutOfMemoryError, one_line
from ...tensor import Array, FeedCheck, TensorSpec
from ..protocol import Feed

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SILENT = 4  # fatal errors only are logged: all others are raised, and what is said of them is ours to say
PREPACK_LIMIT = 64 << 20  # bytes of weights up to which pre-packing costs too little to matter


def import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        if interrupted(error):
            raise KeyboardInterrupt from error
        raise DependencyError(
            "no engine library is installed",
            accepted="onnxruntime or onnxruntime-gpu",
            remedy='pip install "sd-lean[cpu]" (or "sd-lean[gpu]" for CUDA)',
        ) from error
    onnxruntime.set_default_logger_severity(SILENT)
    return onnxruntime


def interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: ONNX Runtime, while it is imported, makes an ImportError of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def has_cuda() -> bool:
    """Whether the installed ONNX Runtime is a build for GPUs."""
    return CUDA in import_onnxruntime().get_available_providers()


class OnnxRuntimeEngine:
    """One graph in one ONNX Runtime session; see `Engine` for the contract."""

    def __init__(
        self,
        graph: bytes,
        folder: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        weights_size: int = 0,
        float16: bool = False,
        threads: int | None = None,
    ) -> None:
        """`graph`: the .onnx bytes; `folder`: where the weights it refers to lie, of `weights_size` bytes, and whether
        they are `float16`."""
        self.inputs, self.outputs = inputs, outputs
        self._check = FeedCheck(inputs)
        options = _cpu_options(prepack=weights_size <= PREPACK_LIMIT, threads=threads)
        options.enable_cpu_mem_arena = not float16  # it would keep what is widened for each call: every weight
        self._session = open_session(graph, folder, inputs, outputs, options, [CPU])

    def place(self, name: str, array: Array) -> Feed:
        """`array` itself: it is where the graph reads it."""
        next(spec for spec in self.inputs if spec.name == name).check(array)
        return array

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        self._check(feeds)
        names = [spec.name for spec in self.outputs]
        try:
            results: list[Array] = self._session.run(names, dict(feeds))
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise translate(error, "the engine failed while running") from error
        return dict(zip(names, results, strict=True))

    def close(self) -> None:
        """Release the session and its memory; `run` must not be called afterwards."""
        del self._session


def _cpu_options(*, prepack: bool, threads: int | None) -> Any:
    ort = import_onnxruntime()
    options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
    # ALL also re-orders weights for the processor: a seventh faster, and private
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if prepack else levels.ORT_ENABLE_EXTENDED
    if threads is not None:
        options.intra_op_num_threads = threads
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def open_session(
    graph: bytes,
    folder: Path,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    options: Any,
    providers: list[Any],
) -> Any:
    """An InferenceSession with the weights in `folder`.  EngineError: it cannot be loaded, or its inputs and outputs
    are not those of the manifest."""
    options.log_severity_level = SILENT
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning steals shared cores
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        session = import_onnxruntime().InferenceSession(graph, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
        raise translate(error, f"cannot load the graph in {folder}") from error
    for kind, specs, nodes in (("inputs", inputs, session.get_inputs()), ("outputs", outputs, session.get_outputs())):
        declared, actual = {s.name for s in specs}, {n.name for n in nodes}
        if declared - actual or (kind == "inputs" and declared != actual):
            raise EngineError(
                f"graph {kind} differ from the manifest",
                got=", ".join(sorted(actual)),
                accepted=", ".join(sorted(declared)),
            )
    return session


def translate(error: Exception, what: str) -> EngineError:
    """What ONNX Runtime raised, as ours."""
    text = str(error)
    if isinstance(error, EngineError):
        return error
    signs = ("out of memory", "Failed to allocate", "bad allocation", "bad_alloc")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return OutOfMemoryError(
            f"{what}: out of memory ({one_line(text, 160)})", remedy="use a smaller batch or picture size"
        )
    return EngineError(f"{what}: {one_line(text, 300)}")
