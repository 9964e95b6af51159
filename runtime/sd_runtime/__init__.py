"""Run exported Stable Diffusion bundles with numpy, pillow and one engine library; torch is never imported.

    from sd_runtime import Pipeline, save_png

    with Pipeline.load("stable-diffusion-v1-5") as pipe:
        result = pipe("a lighthouse at dusk", seed=7)
    save_png(result.images[0], "lighthouse.png", parameters=result.parameters[0])

`__all__` names everything that a public signature shows.  Nothing is imported before a name is used, so that
`import sd_runtime` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle.bundle import Bundle as Bundle
    from .bundle.bundle import GraphFiles as GraphFiles
    from .bundle.manifest import Component as Component
    from .bundle.manifest import Manifest as Manifest
    from .bundle.safetensors_file import SafeTensors as SafeTensors
    from .bundle.verified_file import VerifiedFile as VerifiedFile
    from .engines.backend import Backend as Backend
    from .engines.engines import Engines as Engines
    from .errors import BundleError as BundleError
    from .errors import CancelledError as CancelledError
    from .errors import DeadlineError as DeadlineError
    from .errors import DependencyError as DependencyError
    from .errors import EngineError as EngineError
    from .errors import ExportError as ExportError
    from .errors import NumericalError as NumericalError
    from .errors import OutOfMemoryError as OutOfMemoryError
    from .errors import OverloadedError as OverloadedError
    from .errors import ParityError as ParityError
    from .errors import SDError as SDError
    from .errors import UsageError as UsageError
    from .fields import RNG as RNG
    from .fields import Resize as Resize
    from .generation import Generation as Generation
    from .generation import Stages as Stages
    from .images.convert import Picture as Picture
    from .images.metadata import Parameters as Parameters
    from .images.metadata import read_parameters as read_parameters
    from .images.metadata import save_png as save_png
    from .inputs import Inputs as Inputs
    from .loop.guidance import Guidance as Guidance
    from .networks.safety_checker import SafetyChecker as SafetyChecker
    from .networks.vae import Decoded as Decoded
    from .networks.vae import Posterior as Posterior
    from .pipeline import Pipeline as Pipeline
    from .prepared import Prepared as Prepared
    from .prepared import Start as Start
    from .prompt import PromptEmbeddings as PromptEmbeddings
    from .prompt import Tokenizer as Tokenizer
    from .request import Defaults as Defaults
    from .request import Options as Options
    from .request import Request as Request
    from .request import make_request as make_request
    from .result import Result as Result
    from .result import Step as Step
    from .result import Timings as Timings
    from .sampling import SamplingPlan as SamplingPlan
    from .sampling import SchedulerConfig as SchedulerConfig
    from .serve.async_pipeline import AsyncPipeline as AsyncPipeline
    from .serve.curve import StepCurve as StepCurve
    from .serve.job import Served as Served
    from .serve.job import Ticket as Ticket
    from .serve.job import Times as Times
    from .serve.limits import Limits as Limits
    from .serve.limits import Status as Status
    from .serve.policy import PolicyName as PolicyName
    from .serve.scheduler import Scheduler as Scheduler

from ._version import __version__ as __version__

_HOME = {
    "AsyncPipeline": "serve.async_pipeline",
    "Backend": "engines.backend",
    "Bundle": "bundle.bundle",
    "BundleError": "errors",
    "CancelledError": "errors",
    "Component": "bundle.manifest",
    "DeadlineError": "errors",
    "Decoded": "networks.vae",
    "Defaults": "request",
    "DependencyError": "errors",
    "EngineError": "errors",
    "Engines": "engines.engines",
    "ExportError": "errors",
    "Generation": "generation",
    "GraphFiles": "bundle.bundle",
    "Guidance": "loop.guidance",
    "Inputs": "inputs",
    "Limits": "serve.limits",
    "Manifest": "bundle.manifest",
    "NumericalError": "errors",
    "Options": "request",
    "OutOfMemoryError": "errors",
    "OverloadedError": "errors",
    "Parameters": "images.metadata",
    "ParityError": "errors",
    "Picture": "images.convert",
    "Pipeline": "pipeline",
    "PolicyName": "serve.policy",
    "Posterior": "networks.vae",
    "Prepared": "prepared",
    "PromptEmbeddings": "prompt",
    "RNG": "fields",
    "Request": "request",
    "Resize": "fields",
    "Result": "result",
    "SDError": "errors",
    "SafeTensors": "bundle.safetensors_file",
    "SafetyChecker": "networks.safety_checker",
    "SamplingPlan": "sampling",
    "Scheduler": "serve.scheduler",
    "SchedulerConfig": "sampling",
    "Served": "serve.job",
    "Stages": "generation",
    "Start": "prepared",
    "Status": "serve.limits",
    "Step": "result",
    "StepCurve": "serve.curve",
    "Ticket": "serve.job",
    "Times": "serve.job",
    "Timings": "result",
    "Tokenizer": "prompt",
    "UsageError": "errors",
    "VerifiedFile": "bundle.verified_file",
    "make_request": "request",
    "read_parameters": "images.metadata",
    "save_png": "images.metadata",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
