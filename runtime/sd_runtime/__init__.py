"""Run exported Stable Diffusion bundles with numpy, pillow and one engine library; torch is never imported.

    from sd_runtime import Pipeline

    with Pipeline.load("stable-diffusion-v1-5") as pipe:
        pipe("a lighthouse at dusk", seed=7).images[0].save("lighthouse.png")

Nothing is imported before a name is used, so that `import sd_runtime` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle.bundle import Bundle as Bundle
    from .errors import BundleError as BundleError
    from .errors import DependencyError as DependencyError
    from .errors import EngineError as EngineError
    from .errors import NumericalError as NumericalError
    from .errors import OutOfMemoryError as OutOfMemoryError
    from .errors import SDError as SDError
    from .errors import UsageError as UsageError
    from .generation import Generation as Generation
    from .pipeline import Pipeline as Pipeline
    from .request import Request as Request
    from .request import make_request as make_request
    from .result import Result as Result
    from .result import Step as Step

from ._version import __version__ as __version__

_HOME = {
    "Bundle": "bundle.bundle",
    "BundleError": "errors",
    "DependencyError": "errors",
    "EngineError": "errors",
    "Generation": "generation",
    "NumericalError": "errors",
    "OutOfMemoryError": "errors",
    "Pipeline": "pipeline",
    "Request": "request",
    "Result": "result",
    "SDError": "errors",
    "Step": "result",
    "UsageError": "errors",
    "make_request": "request",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
