"""One graph → one TensorRT engine, with polygraphy, on TensorRT 8.5 to 11.

From version 10 on networks are strongly typed: precision is in the graph.  Version 8 takes it from flags, and from the
names of the layers that must stay float32.  Where versions differ, the comment says since when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt

from sd_runtime.bundle.manifest import EnginePrecision, ShapeRange
from sd_runtime.errors import DependencyError, ExportError, UsageError, one_line

from ..graphs.names import FLOAT32
from .failures import explain

if TYPE_CHECKING:
    import tensorrt as trt

Report = Callable[[str], None]

EXCHANGE = "REFIT_INDIVIDUAL"  # a builder's flag
CASTS = ("CAST", "IDENTITY", "CONSTANT")  # the parser has typed these


@dataclass(frozen=True)
class Tuning:
    """How to build.

    precision     of the arithmetic
    exchangeable  names of the weights that can be exchanged afterwards; see `require_exchangeable`
    workspace     bytes of GPU memory that a layer may use as scratch space; None leaves it to TensorRT
    timing_cache  a file that remembers how fast kernels are on this GPU; created if need be
    """

    precision: EnginePrecision
    exchangeable: tuple[str, ...]
    workspace: int | None
    timing_cache: Path


@dataclass(frozen=True)
class Built:
    """A serialized engine, and how many attentions its graph has that TensorRT may run fused."""

    plan: bytes
    attentions: int


@dataclass
class BuildLog:
    """What TensorRT said during one build, and whether the user pressed Ctrl-C while it called Python: an exception
    must not leave a callback, for in C++ it would end the process.

    listing: whether messages of every kind are kept, for what they say of the engine's layers."""

    listing: bool = False
    messages: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    interrupted: bool = False

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True


def build_engine(label: str, path: Path, profile: Mapping[str, ShapeRange], settings: Tuning, report: Report) -> Built:
    """The engine of the graph in `path`; `report` is told what the builder is at, from version 10 on.

    ExportError says which layer is in the way and what to change; DependencyError: a library is missing."""
    import_tensorrt()
    log = BuildLog()
    try:
        return _build(path, profile, settings, report, log)
    except ExportError:
        raise
    except Exception as error:  # TensorRT's and polygraphy's exceptions have no common base but Exception
        # What TensorRT takes for warnings: "insuficient memory", as it is spelt, and that there is no GPU.
        telling = [text for text in log.warnings if "nsuf" in text or "initialization failure" in text]
        raise explain(label, [*telling, *log.errors] or [str(error)]) from error


def import_tensorrt() -> None:
    """DependencyError, in one line, unless all that building needs is there."""
    try:
        import filelock  # noqa: F401
        import tensorrt  # noqa: F401
        from polygraphy.backend import trt  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: the package is there, a library that it needs is not
        what = f"building engines needs TensorRT, polygraphy and filelock ({one_line(str(error))})"
        raise DependencyError(what, remedy='pip install "sd-lean[tensorrt]"') from error


def _build(path: Path, profile: Mapping[str, ShapeRange], settings: Tuning, report: Report, log: BuildLog) -> Built:
    import tensorrt as trt
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile, engine_bytes_from_network
    from polygraphy.logger import G_LOGGER

    shapes = Profile()
    for name, allowed in profile.items():
        shapes.add(name, allowed.min, allowed.opt, allowed.max)
    monitor = (
        progress_monitor(trt, report, log) if hasattr(trt, "IProgressMonitor") else None
    )  # since 8.6 in C++, 10.0 here
    settings.timing_cache.parent.mkdir(parents=True, exist_ok=True)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        builder = trt.Builder(build_logger(trt, log))
        network, parser = parse(builder, path, settings.precision, log)
        config = CreateConfig(
            profiles=[shapes],
            memory_pool_limits=None
            if settings.workspace is None
            else {trt.MemoryPoolType.WORKSPACE: settings.workspace},
            load_timing_cache=str(settings.timing_cache) if settings.timing_cache.is_file() else None,
            progress_monitor=monitor,
            **(_weakly_typed(settings.precision) if is_weakly_typed() else {}),
        )
        if settings.exchangeable:
            mark_exchangeable(network, settings.exchangeable)
            config = PostprocessConfig(config, lambda *made: made[-1].set_flag(trt.BuilderFlag.__members__[EXCHANGE]))
        try:
            serialized = engine_bytes_from_network(
                (builder, network, parser), config=config, save_timing_cache=str(settings.timing_cache)
            )
        finally:
            if log.interrupted:
                raise KeyboardInterrupt
        # The engine's memory is the builder's own; a copy outlives it.
        return Built(bytes(serialized), attentions(network))


def is_weakly_typed() -> bool:
    """Whether the builder chooses precisions itself, as before version 10."""
    import tensorrt as trt

    return int(trt.__version__.split(".")[0]) < 10


def _weakly_typed(precision: EnginePrecision) -> dict[str, Any]:
    """The options of version 8: float16 where a layer does not ask for float32, and no cuDNN or cuBLAS, whose versions
    8 and 11 few machines still have."""
    import tensorrt as trt

    previews = [value for name, value in trt.PreviewFeature.__members__.items() if name.endswith("_0805")]
    half = {"fp16": True, "precision_constraints": "obey"} if precision == "fp16" else {}
    return {"preview_features": previews, **half}


def require_exchangeable() -> None:
    """UsageError unless weights can be made exchangeable one by one: since 10.2.

    The older flag, REFIT, makes all of them so, biases and norms included: engines are slower, and one that was never
    refitted can lose the bias of a matrix product.  REFIT_IDENTICAL is only for weights that stay as they were."""
    import tensorrt as trt

    if EXCHANGE not in trt.BuilderFlag.__members__:
        got = f"TensorRT {trt.__version__}, whose refittable engines are slower and can lose biases"
        raise UsageError("refittable", got=got, accepted="10.2 or newer", remedy="leave it out, or install a newer one")


def mark_exchangeable(network: Any, names: Iterable[str]) -> None:
    """Mark those weights of a network that have one of the names.  ExportError: it has none of them."""
    if not [name for name in names if network.mark_weights_refittable(name)]:
        raise ExportError(
            "TensorRT finds none of the weights that are to be exchangeable", remedy="leave out --refittable"
        )


def parse(
    builder: trt.Builder, path: Path, precision: EnginePrecision, log: BuildLog
) -> tuple[trt.INetworkDefinition, trt.OnnxParser]:
    """The graph as a network.  ExportError: the parser does not take it."""
    import tensorrt as trt

    # EXPLICIT_BATCH is the only way since 10.0 and no flag any more; STRONGLY_TYPED is known since 9.0.
    flag = trt.NetworkDefinitionCreationFlag.__members__["EXPLICIT_BATCH" if is_weakly_typed() else "STRONGLY_TYPED"]
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(path)):
        said = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise explain(path.parent.name, said or log.errors)
    if is_weakly_typed() and precision == "fp16":
        _hold_float32(network)
    elif hasattr(trt.LayerType, "ATTENTION_INPUT"):  # since 10.14
        _allow_decomposition(network)
    return network, parser


def _hold_float32(network: trt.INetworkDefinition) -> None:
    """Bind the layers that the graph marks to float32: the timestep's sinusoids and the norms' statistics."""
    import tensorrt as trt

    for index in range(network.num_layers):
        layer: Any = network.get_layer(index)
        if FLOAT32 in layer.name and layer.type.name not in CASTS:
            layer.precision = trt.float32
            for output in range(layer.num_outputs):
                layer.set_output_type(output, trt.float32)


def _allow_decomposition(network: trt.INetworkDefinition) -> None:
    """Where TensorRT has no fused kernel for an attention it may take it apart, instead of failing; whether it did is
    looked up in the finished engine."""
    import tensorrt

    trt: Any = tensorrt  # not every version has these names
    for index in range(network.num_layers):
        layer: Any = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # layers come as their base class
            layer.attention.decomposable = True


def attentions(network: trt.INetworkDefinition) -> int:
    """How many attentions a network has: layers of their own where its graph says so, else its softmaxes."""
    kinds = [network.get_layer(index).type.name for index in range(network.num_layers)]
    return kinds.count("ATTENTION_INPUT") or kinds.count("SOFTMAX")


def build_logger(trt: Any, log: BuildLog) -> Any:
    """A logger that keeps errors and warnings; `trt` is the library's module."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # which type checkers only know where TensorRT is installed
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            with log.uninterrupted():
                if log.listing:
                    log.messages.append(msg)
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    log.errors.append(msg)
                elif severity == trt.ILogger.Severity.WARNING:
                    log.warnings.append(msg)

    return Logger()


def progress_monitor(trt: Any, report: Report, log: BuildLog) -> Any:
    """Tells `report` the innermost phase and how far it is, "Tactic selection 120/480", and stops a build that was
    interrupted."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
            with log.uninterrupted():
                self.phases[phase_name] = int(num_steps)
                self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            """False stops the build."""
            with log.uninterrupted():
                self._tell(phase_name, int(step))
            return not log.interrupted

        def phase_finish(self, phase_name: str) -> None:
            with log.uninterrupted():
                self.phases.pop(phase_name, None)

        def _tell(self, phase: str, step: int) -> None:
            report(f"{phase} {step}/{self.phases.get(phase, step)}")

    return Monitor()
