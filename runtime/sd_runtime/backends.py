"""Which of a bundle's TensorRT engines fit this machine, and why the others do not."""

from __future__ import annotations

import shlex

from .bundle import Bundle
from .engines.cuda import Gpu
from .engines.tensorrt import TensorRT, current_target
from .engines.tensorrt_engine import TensorRTEngine
from .errors import DependencyError, EngineError
from .manifest import EngineRecord, Manifest, Target
from .notices import warn

TENSORRT_FORM = "trt"  # what a graph's form starts with that computes as the plain one and is written for TensorRT


def open_tensorrt(bundle: Bundle) -> TensorRTBackend | None:
    """The engines of a bundle that has some; if none fits, a warning says why."""
    try:
        return TensorRTBackend.open(bundle)
    except (DependencyError, EngineError) as error:
        warn(f"{error}; ONNX Runtime is used instead; to build engines on this machine: {rebuild(bundle)}")
        return None


class TensorRTBackend:
    """The GPU, TensorRT, and those engines of a bundle that fit both."""

    def __init__(self, bundle: Bundle, library: TensorRT, gpu: Gpu, records: tuple[EngineRecord, ...]) -> None:
        """`gpu` is the caller's to close, after this."""
        self.gpu = gpu
        self._bundle, self._library, self._records = bundle, library, records

    @classmethod
    def open(cls, bundle: Bundle) -> TensorRTBackend:
        """DependencyError: no TensorRT, or nothing to drive a GPU; EngineError: no GPU, or no engine for the UNet fits
        it: both sides are named."""
        library, gpu = TensorRT(), Gpu()
        here, records = current_target(library, gpu), bundle.manifest.engines
        fitting = tuple(record for record in records if misfit(record, bundle.manifest, here) is None)
        if not any(record.component == "unet" for record in fitting):
            gpu.close()
            reasons = [misfit(record, bundle.manifest, here) for record in records if record.component == "unet"]
            raise EngineError(f"no TensorRT engine fits: {reasons[0] if reasons else 'none was built for the UNet'}")
        return cls(bundle, library, gpu, fitting)

    def records(self, component: str, form: str) -> list[EngineRecord]:
        """The engines that do what a component's graph does, all built from one form of it."""
        found = [r for r in self._records if r.component == component and form in (r.form, served_by(r.form))]
        return [record for record in found if record.form == found[0].form]

    def engine(self, component: str, form: str) -> TensorRTEngine | None:
        """The engine for a component's graph; None if none was built, or none that fits."""
        records = self.records(component, form)
        if not records:
            return None
        graph = self._bundle.component(component).graph(records[0].form)
        return TensorRTEngine(self._library, self.gpu, graph, records, self._bundle.read, rebuild(self._bundle))

    def close(self) -> None:
        """After all engines were closed."""
        self._library.close()


def served_by(form: str) -> str:
    """The form that callers ask for when an engine was built from `form`."""
    return "plain" if form.startswith(TENSORRT_FORM) else form


def misfit(record: EngineRecord, manifest: Manifest, here: Target) -> str | None:
    """Why an engine cannot be used here: what it was built for and what there is; None if it can.

    The versions of CUDA and of the driver are recorded for people; TensorRT does not tie its engines to them."""
    needed = record.target
    if (needed.tensorrt, needed.gpu, needed.compute_capability) != (
        here.tensorrt,
        here.gpu,
        here.compute_capability,
    ):
        return f"{record.path} was built for {machine(needed)}; this is {machine(here)}"
    component = manifest.components[record.component]
    for name, digest in ((component.graph(record.form).path, record.graph), (component.weights, record.weights)):
        present = None if name is None else manifest.files[name].digest
        if present != digest:
            return f"{record.path} was built from another {name} than the bundle has now"
    return None


def machine(target: Target) -> str:
    """A target for people."""
    return (
        f"TensorRT {target.tensorrt} on {target.gpu} (compute capability {target.compute_capability}, "
        f"CUDA {target.cuda}, driver {target.driver})"
    )


def rebuild(bundle: Bundle) -> str:
    """The command that builds a bundle's engines on the machine at hand."""
    return f"sd-export build {shlex.quote(str(bundle.root))}"
