"""Which of a bundle's TensorRT engines fit this machine, why the others do not, and what stands in for them, aloud."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial

from ...bundle.bundle import Bundle
from ...bundle.manifest import EngineRecord, Graph, Manifest, Target
from ...errors import DependencyError, EngineError
from ...notices import warn
from ...tensor import Dim
from ..device import DeviceEngine
from ..gpu.gpu import Gpu
from ..protocol import Engine
from .engine import TensorRTEngine, breadth, untaken
from .library import Shapes, TensorRT, current_target

TENSORRT_FORM = "trt"  # what a graph's form starts with that computes as the plain one and is written for TensorRT
FORMS = {"sampler_step": ("guided", "plain")}  # that engines are built for, where it is not the plain one alone
FOR_EVERY_PICTURE = ("text_encoder", "unet", "vae_decoder", "sampler_step", "pixels")
ANY_ROWS = ("text_encoder", "safety_checker")  # whose callers give them as many rows as their engines take
TEXT = "encoder_hidden_states"
BUILT_SIDES = 64  # pixels: a side that engines are built for is a multiple
MIDDLING_SIDE = 512  # pixels: every dynamic engine takes this and what lies between it and the sides asked for


def open_tensorrt(bundle: Bundle) -> TensorRTBackend | None:
    """The engines of a bundle that has some; if none fits, or not all that every picture needs, a warning says why."""
    try:
        backend = TensorRTBackend.open(bundle)
    except (DependencyError, EngineError) as error:
        warn(f"{error}; ONNX Runtime is used instead; to build engines on this machine: {rebuild(bundle)}")
        return None
    backend.report_missing(FOR_EVERY_PICTURE)
    return backend


class TensorRTBackend:
    """The GPU, TensorRT, and those engines of a bundle that fit both."""

    def __init__(
        self, bundle: Bundle, library: TensorRT, gpu: Gpu, here: Target, records: tuple[EngineRecord, ...]
    ) -> None:
        """`gpu` is the caller's to close, after this."""
        self.gpu = gpu
        self._bundle, self._library, self._records = bundle, library, records
        self._here = here
        self._said: set[str] = set()

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
        return cls(bundle, library, gpu, here, fitting)

    def records(self, component: str, form: str) -> list[EngineRecord]:
        """The engines that do what a component's graph does, all built from one form of it."""
        found = [r for r in self._records if r.component == component and form in (r.form, served_by(r.form))]
        return [record for record in found if record.form == found[0].form]

    def engine(self, component: str, form: str, otherwise: Callable[[], Engine] | None = None) -> TensorRTEngine | None:
        """The engine for a component's graph; None, said aloud, if none was built, or none that fits.

        `otherwise` opens ONNX Runtime's, for shapes that none was built for."""
        records = self.records(component, form)
        if not records:
            self.report_missing([component])
            return None
        graph = self._bundle.component(component).graph(records[0].form)
        stand_in = None
        if otherwise is not None and component not in ANY_ROWS:
            stand_in = partial(self._stand_in, graph, records, otherwise)
        read, command = self._bundle.read, rebuild(self._bundle)
        return TensorRTEngine(self._library, self.gpu, graph, records, read, command, stand_in)

    def report_missing(self, components: Sequence[str]) -> None:
        """Say which of these components have no engine here, and why; each once."""
        manifest, reasons = self._bundle.manifest, dict[str, list[str]]()
        for name in components:
            missing = [form for form in FORMS.get(name, ("plain",)) if not self.records(name, form)]
            if name in manifest.components and missing and name not in self._said:
                self._said.add(name)
                known = [record for record in manifest.engines if record.component == name]
                why = [misfit(record, manifest, self._here) for record in known if served_by(record.form) in missing]
                reason = next((text.split(" ", 1)[1] for text in why if text), "none was built")  # without its path
                reasons.setdefault(reason, []).append(name)
        if reasons:
            listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
            command = rebuild(self._bundle, fallback=True)
            warn(f"no TensorRT engine for {listed}; ONNX Runtime is used there; to build what is missing: {command}")

    def _stand_in(
        self, graph: Graph, records: Sequence[EngineRecord], otherwise: Callable[[], Engine], shapes: Shapes
    ) -> Engine:
        """ONNX Runtime's engine for shapes that no record takes; said once for all components that one build helps.

        EngineError: there is no ONNX Runtime to do it."""
        remedy = self._remedy(graph, records, shapes)
        error = untaken(shapes, records, f"{self._sizes(graph, records, shapes)}{remedy}")
        try:
            engine = otherwise()
        except DependencyError as missing:
            raise EngineError(f"{error}; ONNX Runtime would do without ({missing})") from missing
        if remedy not in self._said:
            self._said.add(remedy)
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
        return f"to build one that does: {rebuild(self._bundle, size=size, fallback=True)}"

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


def rows_a_picture(manifest: Manifest) -> int:
    """Of the UNet's batch, where it is used as its authors recommend: two with guidance, one if it is told the scale or
    the model is meant to be used without."""
    return 1 if told_guidance(manifest) or manifest.defaults.guidance_scale <= 1 else 2


def told_guidance(manifest: Manifest) -> bool:
    """Whether the UNet is told the guidance scale, so that it never has two rows a picture."""
    known = manifest.components.get("unet")
    return known is not None and any(spec.name == "timestep_cond" for spec in known.graph().inputs)


def picture_size(graph: Graph, shapes: Shapes, pixels: int) -> tuple[int, int] | None:
    """(width, height) in pixels of the pictures that inputs of these shapes are about; None: they are about none."""
    for spec in graph.inputs:
        shape = shapes.get(spec.name, ())
        sizes = {axis.symbol: n for axis, n in zip(spec.shape, shape, strict=False) if isinstance(axis, Dim)}
        for prefix, cell in (("latent_", pixels), ("", 1)):
            if f"{prefix}width" in sizes:
                return sizes[f"{prefix}width"] * cell, sizes[f"{prefix}height"] * cell
    return None


def rebuild(bundle: Bundle, *, size: tuple[int, int] | None = None, fallback: bool = False) -> str:
    """The command that builds the engines of a bundle again, on the machine at hand.

    size: (width, height) of pictures that are to have one, too; fallback: the dynamic ones as well."""
    manifest = bundle.manifest
    records = [record for record in manifest.engines if record.component == "unet"]
    exact = [record.profile["sample"].opt for record in records if not breadth(record)]  # each (rows, C, h, w)
    pixels, usual = manifest.latent.pixels, (manifest.defaults.width, manifest.defaults.height)
    sizes = dict.fromkeys((width * pixels, height * pixels) for *_, height, width in exact) or {usual: None}
    if size is not None:
        sizes[(buildable(size[0]), buildable(size[1]))] = None
    batches = sorted({max(rows // rows_a_picture(manifest), 1) for rows, *_ in exact})
    parts = ["sd-export build", shlex.quote(str(bundle.root))]
    if list(sizes) != [usual]:
        parts += [f"--size {width}x{height}" for width, height in sizes]
    if batches not in ([], [1]):
        parts += [f"--batch {','.join(map(str, batches))}"]
    precisions = {record.precision for record in records} - {manifest.precision}
    parts += [f"--precision {precision}" for precision in sorted(precisions)[:1]]
    parts += ["--refittable"] if any(record.refittable for record in records) else []
    parts += ["--no-fallback"] if records and len(exact) == len(records) and not fallback else []
    return " ".join(parts)


def buildable(side: int) -> int:
    """The nearest side in pixels that engines are built for whose dynamic engine also takes `side`."""
    down = side - side % BUILT_SIDES
    return down if side == down or side < MIDDLING_SIDE else down + BUILT_SIDES
