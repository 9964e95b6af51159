"""Engines of TensorRT for RTX: built on any machine, without a GPU, for all GPUs that the library knows.

They are executable content for compute capability 8.0 and later; Turing (7.5) needs an engine of its own.  What cannot
be run cannot be compared: of each engine the builder's own account of its layers is checked, and the runtime compares
it with ONNX Runtime when it first runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import EnginePrecision, Manifest, ShapeRange, Target
from sd_runtime.errors import DependencyError, one_line

from ..progress import describe_size
from .check import Attention, unfused
from .engine import BuildLog, Report, attentions, build_logger, progress_monitor
from .failures import explain
from .launches import FUSED_ATTENTION, Account, read_account
from .plan import BuildOptions, EngineBuild
from .workshop import Checked

TURING: Final = "7.5"
OLDEST: Final = "8.0"  # an engine for it serves later GPUs as well, with the same kernels
PRODUCTS: Final = ("gemm", "correlation", FUSED_ATTENTION)  # what tensor cores are for
MEMORY: Final = 3  # times a network's weights, that building it took at most


@dataclass(frozen=True)
class Portable:
    """A serialized engine, what its builder says of it, and how many attentions its graph has."""

    plan: bytes
    account: Account
    attentions: int


def import_rtx() -> Any:
    """The library's module.  DependencyError, in one line, unless all that building needs is there."""
    try:
        import filelock  # noqa: F401
        import tensorrt_rtx
    except (ImportError, OSError) as error:  # OSError: the package is there, a library that it needs is not
        what = f"building engines needs TensorRT for RTX and filelock ({one_line(str(error))})"
        raise DependencyError(what, remedy='pip install "sd-lean[tensorrt-rtx]"') from error
    return tensorrt_rtx


class PortableWorkshop:
    """Builds with TensorRT for RTX; see `Workshop`."""

    title = "TensorRT for RTX"

    def __init__(self, options: BuildOptions) -> None:
        """DependencyError: the library is missing."""
        trt = import_rtx()
        self.version = str(trt.__version__)
        self.targets = [target_for(OLDEST, trt), *([target_for(TURING, trt)] if options.turing else [])]
        self._workspace = None if options.workspace is None else int(options.workspace * 1e9)

    def needs(self, manifest: Manifest, builds: tuple[EngineBuild, ...]) -> str:
        largest = max((weights_size(manifest, planned) for planned in builds), default=0)
        served = ", ".join(target.compute_capability + "+" * (len(target.serves) > 1) for target in self.targets)
        memory = describe_size(MEMORY * largest + (1 << 30))
        return f"for compute capability {served}; no GPU is needed; each takes up to {memory} of main memory"

    def make(self, bundle: Bundle, planned: EngineBuild, target: Target, report: Report) -> tuple[bytes, Checked]:
        path = bundle.path(planned.graph.path)
        capability = target.compute_capability
        built = build_portable(planned.label, path, planned.profile, capability, self._workspace, report)
        return built.plan, check_structure(planned, built)

    def close(self) -> None: ...


def weights_size(manifest: Manifest, planned: EngineBuild) -> int:
    """Bytes of the weights that go into an engine."""
    weights = manifest.components[planned.component].weights
    return 0 if weights is None else manifest.files[weights].size


def target_for(capability: str, trt: Any) -> Target:
    """What an engine that is built for one compute capability, "8.0", is for: it and the later ones that the library
    knows.  Turing's is for Turing alone."""
    known = sorted(number for name, number in _numbers(trt).items() if name.startswith("SM"))
    least = _number(capability)
    serves = [number for number in known if number == least or (number > least and capability != TURING)]
    names = tuple(f"{number // 10}.{number % 10}" for number in serves)
    return Target("", capability, str(trt.__version__), "", "", "tensorrt_rtx", names)


def _number(capability: str) -> int:
    return int(capability.replace(".", ""))


def _numbers(trt: Any) -> dict[str, int]:
    return {name: int(value) for name, value in trt.ComputeCapability.__members__.items()}


def build_portable(
    label: str,
    path: Path,
    profile: Mapping[str, ShapeRange],
    capability: str = OLDEST,
    workspace: int | None = None,
    report: Report = lambda _: None,
) -> Portable:
    """Build the graph in `path`; `workspace` in bytes, None leaves it to the library.

    DependencyError: the library is missing; ExportError says which layer is in the way and what to change."""
    trt, log = import_rtx(), BuildLog(listing=True)
    builder = trt.Builder(build_logger(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(path)):
        raise explain(label, [str(parser.get_error(index)) for index in range(parser.num_errors)] or log.errors)
    config = _config(trt, builder, capability, workspace)
    config.progress_monitor = progress_monitor(trt, report, log)
    shapes = builder.create_optimization_profile()
    for name, allowed in profile.items():
        shapes.set_shape(name, allowed.min, allowed.opt, allowed.max)
    config.add_optimization_profile(shapes)
    serialized = builder.build_serialized_network(network, config)
    if log.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise explain(label, log.errors)
    return Portable(bytes(serialized), read_account(log.messages), attentions(network))


def _config(trt: Any, builder: Any, capability: str, workspace: int | None) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # a recorded run must not allocate
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the log names no layers
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability(_number(capability)), 0)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    return config


def check_structure(planned: EngineBuild, built: Portable) -> Checked:
    """What the builder's account says against an engine: attentions that are not fused, products in float32."""
    account = built.account
    fused = account.of(FUSED_ATTENTION)
    slow = float32_products(account, planned.precision)
    remarks = [unfused(planned, built.attentions, Attention(fused, 0))]
    remarks += [f"{len(slow)} layers compute in float32, {slow[0]} first: report it, please"] if slow else []
    summary = f"{len(account.launches)} launches, {describe_size(account.activations)} of activations"
    summary += f", {fused} attentions fused" if fused else ""
    return Checked("structure", account.activations, summary, tuple(text for text in remarks if text is not None))


def float32_products(account: Account, precision: EnginePrecision) -> list[str]:
    """The names of matrix products and convolutions that read float32, in an engine of half precision."""
    if precision == "fp32":
        return []
    return [
        launch.name
        for launch in account.launches
        if launch.kind in PRODUCTS and any(tensor.dtype == "Float" for tensor in launch.inputs)
    ]
