"""ONNX Runtime itself: imported, a session opened, what it raises translated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ...errors import DependencyError, EngineError, OutOfMemoryError, one_line
from ...tensor import TensorSpec, check_names
from .installation import check_loadable

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SILENT = 4  # fatal errors only are logged: all others are raised, and what is said of them is ours to say


def import_onnxruntime() -> Any:
    """The library.  DependencyError: there is none, or one that is too old, half uninstalled or does not load."""
    if "onnxruntime" not in sys.modules:
        check_loadable()
    try:
        import onnxruntime
    except ImportError as error:
        if interrupted(error):
            raise KeyboardInterrupt from error
        raise DependencyError(
            f"ONNX Runtime does not load ({one_line(str(error), 160)})",
            remedy='pip install --force-reinstall "sd-lean[cpu]" (or "sd-lean[gpu]" for CUDA)',
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
    check_names("inputs", inputs, [node.name for node in session.get_inputs()])
    check_names("outputs", outputs, [node.name for node in session.get_outputs()])
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
