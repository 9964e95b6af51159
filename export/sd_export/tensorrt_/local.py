"""Engines of TensorRT for the GPU of this machine, each run and compared before it is accepted.

ONNX Runtime, where it is installed, computes the reference that each engine is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.locations import data_home
from sd_runtime.bundle.manifest import EngineRecord, Manifest, Target
from sd_runtime.engines.gpu.gpu import Gpu
from sd_runtime.engines.onnxruntime_.backend import cpu_engine
from sd_runtime.engines.tensorrt_.engine import TensorRTEngine
from sd_runtime.engines.tensorrt_.library import TensorRT, current_target
from sd_runtime.errors import DependencyError

from ..progress import Progress, describe_size
from . import check as build_check
from .engine import Built, Report, Tuning, build_engine, import_tensorrt, require_exchangeable
from .plan import BuildOptions, EngineBuild
from .publish import slug
from .timings import Timing, slower_than_before, slower_than_siblings
from .workshop import Checked, engine_record

if TYPE_CHECKING:
    import tensorrt as trt


class LocalWorkshop:
    """Builds with TensorRT; see `Workshop`."""

    title = "TensorRT"

    def __init__(self, options: BuildOptions, progress: Progress) -> None:
        """DependencyError: something is not installed; EngineError: there is no GPU that works; UsageError: this
        version has no --refittable that costs nothing."""
        import_tensorrt()
        if options.refittable:
            require_exchangeable()
        self._options, self._progress = options, progress
        with ExitStack() as stack:
            self._library, self._gpu = TensorRT(), Gpu()
            stack.callback(self._library.close)
            stack.callback(self._gpu.close)
            target = current_target(self._library, self._gpu)
            self._closing = stack.pop_all()
        self.version, self.targets = self._library.version, [target]
        self._workspace = None if options.workspace is None else int(options.workspace * 1e9)  # bytes
        self._place = data_home() / "tensorrt" / slug(f"{target.gpu} sm{target.compute_capability}-{target.tensorrt}")
        self._timings: dict[str, list[Timing]] = {}  # by component
        self._compares = True

    def close(self) -> None:
        self._closing.close()

    def needs(self, manifest: Manifest, builds: tuple[EngineBuild, ...]) -> str:
        """The references are not in it: each is open only once the builder has given its memory back, maps its weights,
        and computes row by row."""
        files = {manifest.components[planned.component].weights for planned in builds} - {None}
        weights = max((manifest.files[name].size for name in files if name is not None), default=0)
        gpu, host = 2 * weights + (self._workspace or 0), 3 * weights + (1 << 30)
        scratch = " and what its layers use as scratch space" if self._workspace is None else ""
        return (
            f"on {self.targets[0].gpu}; each takes up to {describe_size(gpu)} of GPU memory{scratch}, and "
            f"{describe_size(host)} of main memory"
        )

    def make(self, bundle: Bundle, planned: EngineBuild, target: Target, report: Report) -> tuple[bytes, Checked]:
        built = build_engine(
            planned.label, bundle.path(planned.graph.path), planned.profile, self._tuning(bundle, planned), report
        )
        return built.plan, self._check(bundle, planned, target, built)

    def _tuning(self, bundle: Bundle, planned: EngineBuild) -> Tuning:
        exchangeable = matrices(bundle, planned.component) if self._options.refittable else ()
        return Tuning(planned.precision, exchangeable, self._workspace, self._place / "timing.cache")

    def _check(self, bundle: Bundle, planned: EngineBuild, target: Target, built: Built) -> Checked:
        """Run the engine as the runtime will, and look into it."""
        record = engine_record(bundle.manifest, planned, target, self._options)
        loaded = self._library.load(planned.label, built.plan, self._gpu)
        seen, memory = build_check.attention(loaded.engine), activation_memory(loaded.engine)
        loaded.close()
        factor = bundle.manifest.latent.scaling_factor
        engine = TensorRTEngine(self._library, self._gpu, planned.graph, [record], lambda _: built.plan, "")
        try:
            with self._reference(bundle, planned) as reference:
                cheap = record.weights is None
                findings = build_check.check(planned, engine.run, reference, factor, cheap=cheap)
            took = build_check.milliseconds(engine, next(build_check.probes(planned, "opt", factor)))
        finally:
            engine.close()
        unfused = build_check.unfused(planned, built.attentions, seen)
        remarks = (*findings.remarks, *self._slow(planned, record, took), *([unfused] if unfused else []))
        compared = findings.error is not None
        summary = f"{took:.2f} ms a run, " + (f"differs by {findings.error:.1e}" if compared else "not compared")
        summary += f", {seen.fused} attentions fused" if seen.fused else ""
        return Checked("compared" if compared else "run", memory, summary, remarks)

    def _slow(self, planned: EngineBuild, record: EngineRecord, took: float) -> list[str]:
        """Remarks on how long the engine runs, next to earlier builds and to the same network's other engines."""
        before = slower_than_before(record, planned.label, took, self._place / "timings.json")
        siblings = self._timings.setdefault(planned.component, [])
        remarks = [before] if before is not None else []
        if record.weights is not None:
            new = Timing.of(planned, took)
            remarks += slower_than_siblings(new, siblings)
            siblings.append(new)
        return remarks

    @contextmanager
    def _reference(self, bundle: Bundle, planned: EngineBuild) -> Iterator[build_check.Run | None]:
        """What the engine must agree with, on the CPU, opened as the runtime opens it; None, said once, where there is
        no ONNX Runtime."""
        component = bundle.component(planned.component)
        form = "plain" if component.weights is not None else planned.form
        try:
            reference = cpu_engine(bundle, planned.component, form)
        except DependencyError as error:
            if self._compares:
                self._progress.note(f"engines are not compared with their graphs: {error}")
            self._compares = False
            yield None
            return
        try:
            yield reference.run if component.weights is None else build_check.row_by_row(reference.run, planned)
        finally:
            reference.close()


def matrices(bundle: Bundle, component: str) -> tuple[str, ...]:
    """The names of a component's weights that are no biases or norms."""
    weights = bundle.component(component).weights
    return () if weights is None else tuple(name for name, array in bundle.tensors(weights).items() if array.ndim > 1)


def activation_memory(engine: trt.ICudaEngine) -> int:
    """Bytes that a run takes at the largest shapes."""
    for name in ("device_memory_size_v2", "device_memory_size"):  # since 10.1; until 10
        if hasattr(engine, name):
            return int(getattr(engine, name))
    return 0
