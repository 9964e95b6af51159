"""build(): a bundle → TensorRT engines in it, for the GPU of this machine, or for all that TensorRT for RTX knows.

Needs no torch and no onnx: the graphs for every version of TensorRT are in the bundle already.  An engine enters the
manifest only once it has passed; what was built before stays usable throughout, and an interrupted build goes on where
it stopped.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from sd_runtime.bundle.bundle import Bundle, find_bundle
from sd_runtime.bundle.manifest import Manifest, Target
from sd_runtime.errors import ExportError

from .. import pack
from ..progress import Progress, describe_size
from .failures import NoKernelError
from .plan import BuildOptions, EngineBuild, in_other_form, plan_builds
from .publish import engine_path, publish, remove_unnamed
from .workshop import Workshop, engine_record


def build(options: BuildOptions, *, force: bool = False, quiet: bool = True) -> Path:
    """Build the engines that `options` ask for and return the bundle's folder.  The whole flow:

        bundle → what to build → for each: graph and profile → engine → checked → file → manifest

    Engines that the bundle has already, for the same target, graph and weights, are left as they are, unless `force`
    builds them anew.  One that cannot be built, or is wrong, is noted while the others are built: then ONNX Runtime
    stands in for it.  ExportError, UsageError, DependencyError and EngineError say what is in the way of all, or of the
    UNet's; engines that were finished stay."""
    progress = Progress(quiet=quiet)
    with ExitStack() as stack:
        workshop = stack.enter_context(closing(_open(options, progress)))
        root = find_bundle(str(options.bundle)).resolve()
        manifest = Bundle.open(root).manifest
        builds = plan_builds(manifest, options, workshop.version)
        stack.enter_context(progress)
        progress.expect(len(builds) * len(workshop.targets))
        stack.enter_context(pack.locked(root, progress.note))
        remove_unnamed(root, Bundle.open(root).manifest)
        count = len(builds) * len(workshop.targets)
        opening = f"building {count} engines with {workshop.title} {workshop.version}"
        progress.note(f"{opening} {workshop.needs(manifest, builds)}")
        builder = _Builder(root, options, workshop, progress)
        for target in workshop.targets:
            builder.do_all(builds, target, force=force)
    return root


def require_library(options: BuildOptions) -> None:
    """DependencyError, in one line, unless all that building needs is installed."""
    if options.library == "tensorrt_rtx":
        from .portable import import_rtx

        import_rtx()
    else:
        from .engine import import_tensorrt

        import_tensorrt()


def _open(options: BuildOptions, progress: Progress) -> Workshop:
    if options.library == "tensorrt_rtx":
        from .portable import PortableWorkshop

        return PortableWorkshop(options)
    from .local import LocalWorkshop

    return LocalWorkshop(options, progress)


class _Builder:
    """Builds one engine after the other for one bundle."""

    def __init__(self, root: Path, options: BuildOptions, workshop: Workshop, progress: Progress) -> None:
        self._root, self._options, self._workshop, self._progress = root, options, workshop, progress

    def do_all(self, builds: tuple[EngineBuild, ...], target: Target, *, force: bool) -> None:
        """Build all for one target.  ExportError, once all were tried: there is none of the UNet, or of any network
        where the UNet is not among them."""
        failures: dict[tuple[str, str], ExportError] = {}  # by component and form, the first
        built = set()
        for planned in builds:
            failure = self._try(planned, target, force=force)
            graph = planned.component, planned.form
            if failure is None:
                built.add(graph)
            else:
                failures.setdefault(graph, failure)
        among = any(planned.component == "unet" for planned in builds)
        for graph, error in failures.items():
            if graph not in built and (graph[0] == "unet" or not among):
                raise error

    def _try(self, planned: EngineBuild, target: Target, *, force: bool) -> ExportError | None:
        """Why an engine could not be built, said at once; None if it was, or if there is one already.

        Where the library has no kernel for a graph, it may have one for another form of it."""
        manifest = Bundle.open(self._root).manifest
        other = in_other_form(manifest, planned)
        if not force and any(self._is_there(manifest, one, target) for one in (planned, other) if one is not None):
            self._progress.note(f"{planned.label} is up to date")
            return None
        try:
            try:
                self.do(planned, target)
            except NoKernelError as error:
                if other is None:
                    raise
                self._progress.note(f"{'':<4}{error}; its graph {other.form} is built instead")
                self.do(other, target)
        except ExportError as error:
            self._progress.note(f"{'':<4}{planned.label} is left out: {error}")
            return error
        return None

    def _is_there(self, manifest: Manifest, planned: EngineBuild, target: Target) -> bool:
        record = engine_record(manifest, planned, target, self._options)
        return record in [replace(known, path="", activation_memory=0, checked=None) for known in manifest.engines]

    def do(self, planned: EngineBuild, target: Target) -> None:
        """Build, check and publish one engine."""
        bundle = Bundle.open(self._root)
        record = engine_record(bundle.manifest, planned, target, self._options)
        with self._progress.stage(planned.label):
            bundle.open_graph(planned.component, planned.form)  # which the parser reads by its path
            report = partial(self._progress.detail, planned.label)
            plan, checked = self._workshop.make(bundle, planned, target, report)
            path = engine_path(target, planned.label, plan)
            record = replace(record, path=path, activation_memory=checked.activation_memory, checked=checked.how)
            publish(self._root, record, plan)
        self._progress.note(f"{'':<4}{describe_size(len(plan))}, {checked.summary}")
        for remark in checked.remarks:
            self._progress.note(f"{'':<4}{remark}")
