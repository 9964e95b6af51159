"""Which of a bundle's TensorRT engines fit this machine, why the others do not, and what stands in for them, aloud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ...bundle.bundle import Bundle
from ...bundle.catalogue import ALWAYS, CATALOGUE
from ...bundle.manifest import EngineLibrary, EnginePrecision, EngineRecord, Graph, Manifest, Target
from ...errors import DependencyError, EngineError
from ...notices import warn
from ...tensor import Dim
from ..backend import Machine
from ..device import DeviceEngine
from ..gpu.gpu import Gpu
from ..protocol import Engine
from .engine import TensorRTEngine, breadth, not_built_for
from .library import TITLES, Shapes, TensorRT, current_target
from .rebuild import rebuild
from .trial import Trial

TENSORRT_FORM = "trt"  # what a graph's form starts with that computes as the plain one and is written for TensorRT
TEXT = "encoder_hidden_states"


def open_tensorrt(bundle: Bundle, machine: Machine, library: EngineLibrary = "tensorrt") -> TensorRTBackend | None:
    """A library's engines of a bundle that has some, not for the CPU; if none fits, or not all that every picture
    needs, a warning says why."""
    unused = machine.on_cpu
    try:
        backend = TensorRTBackend.open(bundle, machine, library)
    except (DependencyError, EngineError) as error:
        if unused:
            machine.close()
        warn(f"{error}; {stand_in(library, bundle.manifest)} is used instead; {advice(library, bundle)}")
        return None
    backend.report_missing(ALWAYS)
    return backend


class TensorRTBackend:
    """TensorRT, or TensorRT for RTX, on a GPU, and those engines of a bundle that fit both."""

    def __init__(
        self, bundle: Bundle, library: TensorRT, gpu: Gpu, here: Target, records: tuple[EngineRecord, ...]
    ) -> None:
        """`gpu` is the caller's to close, after this."""
        self._bundle, self._library, self._gpu, self._records = bundle, library, gpu, records
        self._here, self.name = here, library.name
        self._trial = Trial(library, gpu, bundle)
        self._reported: set[str] = set()

    @classmethod
    def open(cls, bundle: Bundle, machine: Machine, name: EngineLibrary = "tensorrt") -> TensorRTBackend:
        """DependencyError: no such library, or nothing to drive a GPU; EngineError: no GPU, or no engine for the UNet
        fits it: both sides are named."""
        library, gpu = TensorRT(name), machine.gpu()
        here, records = current_target(library, gpu), bundle.manifest.engines_of(name)
        fitting = tuple(record for record in records if why_unusable(record, bundle.manifest, here) is None)
        if not any(record.component == "unet" for record in fitting):
            reasons = [why_unusable(record, bundle.manifest, here) for record in records if record.component == "unet"]
            raise EngineError(
                f"no {library.title} engine fits: {reasons[0] if reasons else 'none was built for the UNet'}"
            )
        return cls(bundle, library, gpu, here, fitting)

    def records(self, component: str, form: str) -> list[EngineRecord]:
        """The engines that do what a component's graph does, all of one precision."""
        found = [r for r in self._records if r.component == component and form in (r.form, requested_form(r.form))]
        return [record for record in found if record.precision == found[0].precision]

    def engine(self, component: str, form: str, fallback: Callable[[], Engine]) -> TensorRTEngine | None:
        """The engine for a component's graph; None, said aloud, if none was built, or none that fits."""
        records = self.records(component, form)
        if not records:
            self.report_missing([component])
            return None
        if self._here.library == "tensorrt_rtx":
            records = [record for record in records if self._trial.passes(record, form, fallback)]
            if not records:
                return None
        graph = self._bundle.component(component).graph(records[0].form)
        other = None if CATALOGUE[component].any_rows else partial(self._fall_back, graph, records, fallback)
        command, read = rebuild(self._bundle, self._here.library), self._bundle.read_engine
        return TensorRTEngine(self._library, self._gpu, graph, records, read, command, other)

    def batch_sizes(self, most: int, rows: int, latent: tuple[int, ...]) -> Sequence[int]:
        built = [record.profile["sample"] for record in self.records("unet", "plain")]
        return [n for n in range(1, most + 1) if any(allowed.accepts((n * rows, *latent)) for allowed in built)]

    def precision(self, component: str) -> EnginePrecision | None:
        built = self.records(component, "plain")
        return built[0].precision if built else None

    def report_missing(self, components: Sequence[str]) -> None:
        """Say which of these components have no engine here, and why; each once."""
        manifest, reasons = self._bundle.manifest, dict[str, list[str]]()
        for name in components:
            missing = [form for form in CATALOGUE[name].forms if not self.records(name, form)]
            if name in manifest.components and missing and name not in self._reported:
                self._reported.add(name)
                known = [r for r in manifest.engines_of(self._here.library) if r.component == name]
                known = [record for record in known if requested_form(record.form) in missing]
                why = [why_unusable(record, manifest, self._here) for record in known]
                reason = next((text.split(" ", 1)[1] for text in why if text), "none was built")  # without its path
                reasons.setdefault(reason, []).append(name)
        if reasons:
            listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
            command = rebuild(self._bundle, self._here.library, fallback=True)
            other = stand_in(self._here.library, manifest)
            warn(f"no TensorRT engine for {listed}; {other} is used there; to build what is missing: {command}")

    def _fall_back(
        self, graph: Graph, records: Sequence[EngineRecord], fallback: Callable[[], Engine], shapes: Shapes
    ) -> Engine:
        """ONNX Runtime's engine for shapes that no record takes; said once for all components that one build helps.

        EngineError: there is no ONNX Runtime to do it."""
        remedy = self._remedy(graph, records, shapes)
        error = not_built_for(shapes, records, f"{self._sizes(graph, records, shapes)}{remedy}")
        try:
            engine = fallback()
        except DependencyError as missing:
            raise EngineError(f"{error}; ONNX Runtime would do without ({missing})") from missing
        if remedy not in self._reported:
            self._reported.add(remedy)
            place = "" if isinstance(engine, DeviceEngine) else " on the CPU"
            warn(f"{error}; ONNX Runtime{place} is used instead")
        return engine

    def _remedy(self, graph: Graph, records: Sequence[EngineRecord], shapes: Shapes) -> str:
        """What to do about shapes that none of `records` takes."""
        dynamic = [record for record in records if TEXT in record.profile and breadth(record)]
        longest = max((record.profile[TEXT].max[1] for record in dynamic), default=0)
        if dynamic and shapes[TEXT][1] > longest:
            return f"engines take prompts of up to {longest} tokens"
        size = picture_size(graph, shapes, self._bundle.manifest.latent.pixels)
        return f"to build one that does: {rebuild(self._bundle, self._here.library, size=size, fallback=True)}"

    def _sizes(self, graph: Graph, records: Sequence[EngineRecord], shapes: Shapes) -> str:
        """Which pictures the engines are for, where that is why they do not take these shapes; "" where it is not."""
        size = picture_size(graph, shapes, self._bundle.manifest.latent.pixels)
        if size is None:
            return ""
        built = []
        for record in records:
            low, high = ({name: getattr(r, end) for name, r in record.profile.items()} for end in ("min", "max"))
            ends = [picture_size(graph, end, self._bundle.manifest.latent.pixels) or size for end in (low, high)]
            if all(least <= side <= most for least, side, most in zip(ends[0], size, ends[1], strict=True)):
                return ""
            built.append(" to ".join(dict.fromkeys(f"{width}x{height}" for width, height in ends)))
        return f"built for pictures of {', '.join(dict.fromkeys(built))}, not {size[0]}x{size[1]}; "

    def close(self) -> None:
        """After all engines were closed."""
        self._library.close()


def stand_in(library: EngineLibrary, manifest: Manifest) -> str:
    """What is asked where a library has no engine."""
    if library == "tensorrt" and manifest.engines_of("tensorrt_rtx"):
        return "TensorRT for RTX or ONNX Runtime"
    return "ONNX Runtime"


def advice(library: EngineLibrary, bundle: Bundle) -> str:
    """What to do where none of a library's engines can be used: those of TensorRT for RTX are for all GPUs that it
    knows, so that for another one there is only TensorRT."""
    fitting = rebuild(bundle) if library == "tensorrt_rtx" else rebuild(bundle, library)
    return f"to build engines on this machine: {fitting}"


def requested_form(form: str) -> str:
    """The form that callers ask for when an engine was built from `form`."""
    return "plain" if form.startswith(TENSORRT_FORM) else form


def why_unusable(record: EngineRecord, manifest: Manifest, here: Target) -> str | None:
    """Why an engine cannot be used here: what it was built for and what there is; None if it can.

    The versions of CUDA and of the driver are recorded for people; TensorRT does not tie its engines to them."""
    needed = record.target
    if needed.library == "tensorrt_rtx":  # which says of its engines itself whether a version reads them
        if here.compute_capability not in needed.serves:
            return f"{record.path} was built for {machine(needed)}; this is {machine(here)}"
    elif (needed.tensorrt, needed.gpu, needed.compute_capability) != (
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
    if target.serves:
        return f"compute capability {', '.join(target.serves)} by TensorRT for RTX {target.tensorrt}"
    return (
        f"{TITLES[target.library]} {target.tensorrt} on {target.gpu} (compute capability {target.compute_capability}, "
        f"CUDA {target.cuda}, driver {target.driver})"
    )


def picture_size(graph: Graph, shapes: Shapes, pixels: int) -> tuple[int, int] | None:
    """(width, height) in pixels of the pictures that inputs of these shapes are about; None: they are about none."""
    for spec in graph.inputs:
        shape = shapes.get(spec.name, ())
        sizes = {axis.symbol: n for axis, n in zip(spec.shape, shape, strict=False) if isinstance(axis, Dim)}
        for prefix, cell in (("latent_", pixels), ("", 1)):
            if f"{prefix}width" in sizes:
                return sizes[f"{prefix}width"] * cell, sizes[f"{prefix}height"] * cell
    return None
