"""Export Stable Diffusion checkpoints to bundles of ONNX graphs that sd_runtime runs.

    from sd_export import BuildOptions, ExportOptions, build, export

    bundle = export(ExportOptions("demo"))      needs: pip install "sd-lean[export]"
    build(BuildOptions(bundle))                 TensorRT engines in it, for the GPU of this machine

Nothing is imported before a name is used, so that `import sd_export` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd_runtime.bundle.manifest import EngineLibrary as EngineLibrary
    from sd_runtime.bundle.manifest import EnginePrecision as EnginePrecision
    from sd_runtime.bundle.manifest import Precision as Precision
    from sd_runtime.errors import ExportError as ExportError

    from .choices import PredictionType as PredictionType
    from .exporter import export as export
    from .options import ExportOptions as ExportOptions
    from .tensorrt_.build import build as build
    from .tensorrt_.plan import BuildOptions as BuildOptions

_HOME = {
    "BuildOptions": "sd_export.tensorrt_.plan",
    "EngineLibrary": "sd_runtime.bundle.manifest",
    "EnginePrecision": "sd_runtime.bundle.manifest",
    "ExportError": "sd_runtime.errors",
    "ExportOptions": "sd_export.options",
    "Precision": "sd_runtime.bundle.manifest",
    "PredictionType": "sd_export.choices",
    "build": "sd_export.tensorrt_.build",
    "export": "sd_export.exporter",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
