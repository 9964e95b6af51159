"""build(): a bundle → TensorRT engines in it, for the GPU and the TensorRT of this machine.

Needs no torch and no onnx: the graphs for every version of TensorRT are in the bundle already.  ONNX Runtime, where it
is installed, computes the reference that each engine is compared with.  An engine enters the manifest only once it has
passed; what was built before stays usable throughout, and an interrupted build goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sd_runtime.bundle.bundle import Bundle, find_bundle
from sd_runtime.bundle.locations import data_home
from sd_runtime.bundle.manifest import EngineRecord, Manifest, Target
from sd_runtime.engines.gpu.gpu import Gpu
from sd_runtime.engines.onnxruntime_.backend import cpu_engine
from sd_runtime.engines.tensorrt_.engine import TensorRTEngine
from sd_runtime.engines.tensorrt_.library import TensorRT, current_target
from sd_runtime.errors import DependencyError

from .. import pack
from ..progress import Progress, describe_size
from . import check as build_check
from .engine import Built, Settings, build_engine, import_tensorrt
from .plan import BuildOptions, EngineBuild, plan_builds
from .publish import engine_path, publish, remove_unnamed, slug
from .timings import Timing, slower_than_before, slower_than_siblings

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class Outcome:
    """What was found out about an engine before it was accepted."""

    activation_memory: int
    error: float | None
    milliseconds: float
    attention: build_check.Attention
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.milliseconds:.2f} ms a run"]
        parts += [f"differs by {self.error:.1e}"] if self.error is not None else ["not compared"]
        parts += [f"{self.attention.fused} attentions fused"] if self.attention.fused else []
        return ", ".join(parts)


def build(options: BuildOptions, *, force: bool = False, quiet: bool = True) -> Path:
    """Build the engines that `options` ask for and return the bundle's folder.  The whole flow:

        bundle → what to build → for each: graph and profile → engine → compared with its reference → file → manifest

    Engines that the bundle has already, for the same machine, graph and weights, are left as they are, unless `force`
    builds them anew.  ExportError, UsageError, DependencyError and EngineError say what is in the way; engines that
    were finished stay."""
    import_tensorrt()
    root = find_bundle(str(options.bundle)).resolve()
    with ExitStack() as stack:
        library, gpu = TensorRT(), Gpu()
        stack.callback(library.close)
        stack.callback(gpu.close)
        target = current_target(library, gpu)
        bundle = Bundle.open(root)
        builds = plan_builds(bundle.manifest, options, library.version)
        progress = stack.enter_context(Progress(len(builds), quiet=quiet))
        stack.enter_context(pack.locked(root, progress.note))
        remove_unnamed(root, Bundle.open(root).manifest)
        builder = _Builder(root, options, target, library, gpu, progress)
        builder.state_needs(builds)
        for planned in builds:
            builder.do(planned, force=force)
    return root


class _Builder:
    """Builds one engine after the other for one bundle on one machine."""

    def __init__(
        self, root: Path, options: BuildOptions, target: Target, library: TensorRT, gpu: Gpu, progress: Progress
    ) -> None:
        self._root, self._options, self._target = root, options, target
        self._library, self._gpu, self._progress = library, gpu, progress
        self._workspace = int(options.workspace * 1e9)  # bytes
        self._place = data_home() / "tensorrt" / slug(f"{target.gpu} sm{target.compute_capability}-{target.tensorrt}")
        self._timings: dict[str, list[Timing]] = {}  # by component
        self._compares = True

    def state_needs(self, builds: tuple[EngineBuild, ...]) -> None:
        """Say what building will take before it starts.  The references are not in it: each is open only once the
        builder has given its memory back, maps its weights, and computes row by row."""
        manifest = Bundle.open(self._root).manifest
        files = {manifest.components[planned.component].weights for planned in builds} - {None}
        weights = max((manifest.files[name].size for name in files if name is not None), default=0)
        gpu, host = 2 * weights + self._workspace, 3 * weights + (1 << 30)
        self._progress.note(
            f"building {len(builds)} engines with TensorRT {self._target.tensorrt} on {self._target.gpu}; each takes "
            f"up to {describe_size(gpu)} of GPU memory and {describe_size(host)} of main memory"
        )

    def do(self, planned: EngineBuild, *, force: bool) -> None:
        """Build, check and publish one engine, unless the bundle has it."""
        bundle = Bundle.open(self._root)
        component = bundle.component(planned.component)
        record = self._record(planned, bundle.manifest, component.weights)
        if not force and any(
            replace(known, path="", activation_memory=0) == record for known in bundle.manifest.engines
        ):
            self._progress.note(f"{planned.label} is up to date")
            return
        with self._progress.stage(planned.label):
            bundle.open_graph(planned.component, planned.form)  # which the parser reads by its path
            report = partial(self._progress.detail, planned.label)
            built = build_engine(
                planned.label, bundle.path(planned.graph.path), planned.profile, self._settings(planned), report
            )
            record = replace(record, path=engine_path(self._target, planned.label, built.plan))
            outcome = self._check(bundle, planned, record, built)
            publish(self._root, replace(record, activation_memory=outcome.activation_memory), built.plan)
        self._progress.note(f"{'':<4}{describe_size(len(built.plan))}, {outcome}")
        for remark in outcome.remarks:
            self._progress.note(f"{'':<4}{remark}")

    def _settings(self, planned: EngineBuild) -> Settings:
        return Settings(planned.precision, self._options.refittable, self._workspace, self._place / "timing.cache")

    def _record(self, planned: EngineBuild, manifest: Manifest, weights: str | None) -> EngineRecord:
        """The engine's, but for its path, which depends on its content, and for the memory that it takes."""
        return EngineRecord(
            component=planned.component,
            form=planned.form,
            path="",
            precision=planned.precision,
            profile=planned.profile,
            target=self._target,
            graph=manifest.files[planned.graph.path].digest,
            weights=manifest.files[weights].digest if weights is not None else None,
            refittable=self._options.refittable,
            activation_memory=0,
        )

    def _check(self, bundle: Bundle, planned: EngineBuild, record: EngineRecord, built: Built) -> Outcome:
        """Run the engine as the runtime will, and look into it."""
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
        return Outcome(memory, findings.error, took, seen, remarks)

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
        try:
            reference = cpu_engine(
                bundle, planned.component, "plain" if component.weights is not None else planned.form
            )
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


def activation_memory(engine: trt.ICudaEngine) -> int:
    """Bytes that a run takes at the largest shapes."""
    for name in ("device_memory_size_v2", "device_memory_size"):  # since 10.1; until 10
        if hasattr(engine, name):
            return int(getattr(engine, name))
    return 0
