"""build(): a bundle → TensorRT engines in it, for the GPU and the TensorRT of this machine.

Needs no torch and no onnx: the graphs for every version of TensorRT are in the bundle already.  ONNX Runtime, where it
is installed, computes the reference that each engine is compared with.  An engine enters the manifest only once it has
passed; what was built before stays usable throughout, and an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sd_runtime.bundle import Bundle, find_bundle
from sd_runtime.engines.cuda import Gpu
from sd_runtime.engines.onnxruntime import OnnxRuntimeEngine
from sd_runtime.engines.protocol import Engine
from sd_runtime.engines.tensorrt import TensorRT, current_target
from sd_runtime.engines.tensorrt_engine import TensorRTEngine
from sd_runtime.errors import DependencyError
from sd_runtime.locations import data_home
from sd_runtime.manifest import MANIFEST, EngineRecord, Manifest, Target, record_file

from . import build_check, pack
from .build_engine import Settings, build_engine, import_tensorrt
from .build_plan import BuildRequest, Job, plan_jobs
from .progress import Progress, describe_size

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


def build(request: BuildRequest, *, quiet: bool = True) -> Path:
    """Build the engines for a request and return the bundle's folder.  The whole flow:

        bundle → jobs → for each: graph and profile → engine → compared with its reference → file → manifest

    Engines that the bundle has already, for the same machine, graph and weights, are left as they are.  ExportError,
    UsageError, DependencyError and EngineError say what is in the way; engines that were finished stay."""
    import_tensorrt()
    root = find_bundle(str(request.bundle)).resolve()
    with ExitStack() as stack:
        library, gpu = TensorRT(), Gpu()
        stack.callback(library.close)
        stack.callback(gpu.close)
        target = current_target(library, gpu)
        bundle = Bundle.open(root)
        jobs = plan_jobs(bundle.manifest, request, library.version)
        progress = stack.enter_context(Progress(len(jobs), quiet=quiet))
        stack.enter_context(pack.locked(root, progress.note))
        builder = _Builder(root, request, target, library, gpu, progress)
        stack.callback(builder.close)
        builder.state_needs(jobs)
        for job in jobs:
            builder.do(job)
    return root


class _Builder:
    """Does one job after the other for one bundle on one machine."""

    def __init__(
        self, root: Path, request: BuildRequest, target: Target, library: TensorRT, gpu: Gpu, progress: Progress
    ) -> None:
        self._root, self._request, self._target = root, request, target
        self._library, self._gpu, self._progress = library, gpu, progress
        self._workspace = int(request.workspace * 1e9)  # bytes
        self._place = data_home() / "tensorrt" / slug(f"{target.gpu} sm{target.compute_capability}-{target.tensorrt}")
        self._references: dict[str, Engine | None] = {}

    def state_needs(self, jobs: tuple[Job, ...]) -> None:
        """Say what building will take before it starts."""
        manifest = Bundle.open(self._root).manifest
        files = {manifest.components[job.component].weights for job in jobs} - {None}
        weights = max((manifest.files[name].size for name in files if name is not None), default=0)
        gpu, host = 2 * weights + self._workspace, 3 * weights + (1 << 30)
        self._progress.note(
            f"building {len(jobs)} engines with TensorRT {self._target.tensorrt} on {self._target.gpu}; each takes up "
            f"to {describe_size(gpu)} of GPU memory and {describe_size(host)} of main memory"
        )

    def do(self, job: Job) -> None:
        """Build, check and publish one engine, unless the bundle has it."""
        bundle = Bundle.open(self._root)
        component = bundle.component(job.component)
        sources = [name for name in (job.graph.path, component.weights) if name is not None]
        record = self._record(job, bundle.manifest, component.weights)
        if any(replace(known, activation_memory=0) == record for known in bundle.manifest.engines):
            self._progress.note(f"{job.label} is up to date")
            return
        with self._progress.stage(job.label):
            bundle.verify(sources)
            report = partial(self._progress.detail, job.label)
            plan = build_engine(job.label, bundle.path(job.graph.path), job.profile, self._settings(job), report)
            outcome = self._check(bundle, job, record, plan)
            publish(self._root, replace(record, activation_memory=outcome.activation_memory), plan)
        self._progress.note(f"{'':<4}{describe_size(len(plan))}, {outcome}")
        for remark in outcome.remarks:
            self._progress.note(f"{'':<4}{remark}")

    def _settings(self, job: Job) -> Settings:
        return Settings(job.precision, self._request.refittable, self._workspace, self._place / "timing.cache")

    def _record(self, job: Job, manifest: Manifest, weights: str | None) -> EngineRecord:
        return EngineRecord(
            component=job.component,
            form=job.form,
            path=f"engines/{slug(f'{self._target.gpu} trt{self._target.tensorrt}')}/{slug(job.label)}.plan",
            precision=job.precision,
            profile=job.profile,
            target=self._target,
            graph=manifest.files[job.graph.path].digest,
            weights=manifest.files[weights].digest if weights is not None else None,
            refittable=self._request.refittable,
            activation_memory=0,
        )

    def _check(self, bundle: Bundle, job: Job, record: EngineRecord, plan: bytes) -> Outcome:
        """Run the engine as the runtime will, and look into it."""
        loaded = self._library.load(job.label, plan, self._gpu)
        seen, memory = build_check.attention(loaded.engine), activation_memory(loaded.engine)
        loaded.close()
        engine = TensorRTEngine(self._library, self._gpu, job.graph, [record], lambda _: plan, "")
        try:
            inputs = build_check.probe(job)
            reference = self._reference(bundle, job)
            expected = reference.run(dict(inputs)) if reference is not None else None
            error = build_check.compare(job, engine.run(dict(inputs)), expected)
            took = build_check.milliseconds(engine, inputs)
        finally:
            engine.close()
        slower = build_check.slower_than_before(job, record.graph, took, self._place / "timings.json")
        return Outcome(memory, error, took, seen, tuple(r for r in (slower, unfused(job, seen)) if r is not None))

    def _reference(self, bundle: Bundle, job: Job) -> Engine | None:
        """The graph that the engine must agree with, on the CPU; None, said once, where there is no ONNX Runtime."""
        component = bundle.component(job.component)
        graph = component.graph("plain") if component.weights is not None else job.graph
        if graph.path not in self._references:
            try:
                self._references[graph.path] = OnnxRuntimeEngine(
                    bundle.read(graph.path), bundle.path(graph.path).parent, graph.inputs, graph.outputs
                )
            except DependencyError as error:
                if not self._references:
                    self._progress.note(f"engines are not compared with their graphs: {error}")
                self._references[graph.path] = None
        return self._references[graph.path]

    def close(self) -> None:
        for reference in self._references.values():
            if reference is not None:
                reference.close()


def publish(root: Path, record: EngineRecord, plan: bytes) -> None:
    """Put an engine into the bundle in `root`, in place of those that it supersedes: the same shapes, or the same
    component on the same machine in another form, precision, or from other weights."""
    manifest = Manifest.from_bytes((root / MANIFEST).read_bytes())
    superseded = [known for known in manifest.engines if supersedes(record, known)]
    kept = tuple(known for known in manifest.engines if known not in superseded)
    write_synced(root / record.path, plan)
    files = {name: file for name, file in manifest.files.items() if name not in {known.path for known in superseded}}
    files[record.path] = record_file(root / record.path)
    manifest = replace(manifest, files=dict(sorted(files.items())), engines=(*kept, record))
    write_synced(root / MANIFEST, manifest.to_bytes())
    for known in superseded:
        if known.path not in files:
            (root / known.path).unlink(missing_ok=True)


def supersedes(new: EngineRecord, old: EngineRecord) -> bool:
    if new.path == old.path:
        return True
    same_place = (new.component, new.target) == (old.component, old.target)
    families = [(r.form, r.precision, r.graph, r.weights) for r in (new, old)]
    return same_place and new.weights is not None and families[0] != families[1]


def write_synced(path: Path, data: bytes) -> None:
    """Replace a file as a whole: it is the old one or the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.partial")
    try:
        with partial_path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


def activation_memory(engine: trt.ICudaEngine) -> int:
    """Bytes that a run takes at the largest shapes."""
    for name in ("device_memory_size_v2", "device_memory_size"):  # since 10.1; until 10
        if hasattr(engine, name):
            return int(getattr(engine, name))
    return 0


def unfused(job: Job, seen: build_check.Attention) -> str | None:
    if not seen.apart or job.precision == "fp32":  # fused kernels are for half precision
        return None
    return f"{seen.apart} attentions are not fused: another version of TensorRT may be faster"


def slug(text: str) -> str:
    """`text` as part of a file name: "NVIDIA H200 trt10.13.3" → "nvidia-h200-trt10.13.3"."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")
