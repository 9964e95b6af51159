"""ONNX Runtime itself: imported, a session opened, what it raises translated."""

from __future__ import annotations

import sys
from typing import Any

from ...bundle.bundle import GraphFiles
from ...bundle.verified_file import open_by_name
from ...errors import DependencyError, EngineError, OutOfMemoryError, one_line
from ...tensor import DTYPES, TensorSpec
from ..causes import shortened
from .installation import check_loadable

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ONNX_TYPES = {dtype: f"tensor({dtype})" for dtype in DTYPES} | {"float32": "tensor(float)"}
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
    files: GraphFiles,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    options: Any,
    providers: list[Any],
) -> Any:
    """An InferenceSession of a graph.  EngineError: it cannot be loaded, or its inputs and outputs are not those of the
    manifest; BundleError: its weights are not those that were verified."""
    options.log_severity_level = SILENT
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning steals shared cores
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(files.folder))

    def create() -> Any:
        try:
            return import_onnxruntime().InferenceSession(files.content, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise translate(error, f"cannot load {files.name}") from error

    session = open_by_name(create, [] if files.weights is None else [files.weights])
    for kind, specs, nodes in (("inputs", inputs, session.get_inputs()), ("outputs", outputs, session.get_outputs())):
        _compare(f"{files.name}: {kind} differ from the manifest", specs, nodes, others=kind == "outputs")
    return session


def _compare(what: str, specs: tuple[TensorSpec, ...], nodes: list[Any], *, others: bool) -> None:
    """EngineError unless a graph's tensors have the names and the types that the manifest says; `others`: or more."""
    declared = {spec.name: ONNX_TYPES[spec.dtype] for spec in specs}
    actual = {node.name: node.type for node in nodes}
    if others:
        actual = {name: kind for name, kind in actual.items() if name in declared} or actual
    if actual != declared:
        got, accepted = (", ".join(f"{n} {t}" for n, t in sorted(side.items())) for side in (actual, declared))
        raise EngineError(what, got=one_line(got, 300), accepted=accepted)


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
    return EngineError(f"{what}: {shortened(text)}")
