"""The builder's half of a fake TensorRT: parses what a version's real parser parses, and "builds" engines that
`fake_tensorrt` runs.

A network keeps the operators of its graph as layers, so that what the builder is told of them can be looked up.  What a
build is to go wrong with is set on `FakeBuilders`: errors to log, or another graph to put into the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import onnx
import pytest
from fake_tensorrt import FakeTensorRT, Severity, fake_plan, must_start
from sd_runtime.bundle.manifest import ShapeRange

# Since which version the parser takes an operator, where that is later than 8.5, and up to which opset.
SINCE = {"LayerNormalization": (8, 6), "Gelu": (10, 0), "Attention": (10, 14), "GroupNormalization": (10, 15)}
OPSETS = {(8, 5): 17, (8, 6): 17, (10, 0): 20, (10, 13): 22, (10, 14): 23, (10, 15): 24, (11, 4): 24}


def enum(name: str, *members: str) -> Any:
    return IntEnum(name, {member: index for index, member in enumerate(members)})


MemoryPoolType = enum("MemoryPoolType", "WORKSPACE", "DLA_MANAGED_SRAM")
Verbosity = enum("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
Format = enum("LayerInformationFormat", "ONELINE", "JSON")
DeviceType = enum("DeviceType", "GPU", "DLA")
OldFlags = enum("BuilderFlag", "FP16", "TF32", "REFIT", "OBEY_PRECISION_CONSTRAINTS")
MidFlags = enum("BuilderFlag", "TF32", "REFIT", "STRIP_PLAN")
NewFlags = enum("BuilderFlag", "TF32", "REFIT", "STRIP_PLAN", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL")
OldCreation = enum("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH")
MidCreation = enum("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH", "STRONGLY_TYPED")
NewCreation = enum("NetworkDefinitionCreationFlag", "STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")
Previews = enum("PreviewFeature", "FASTER_DYNAMIC_SHAPES_0805", "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805")
OldLayers = enum("LayerType", "SHAPE", "OTHER", "SOFTMAX")
NewLayers = enum("LayerType", "SHAPE", "OTHER", "SOFTMAX", "ATTENTION_INPUT")


class IProgressMonitor:
    pass


class IAttentionInputLayer:
    pass


@dataclass
class FakeBuilders:
    """The library's builders in one version, and what they were asked."""

    library: FakeTensorRT
    failure: list[str] = field(default_factory=list)  # errors to log instead of building
    built_instead: Path | None = None  # a graph to build in the place of the one that was parsed
    interrupt_after: int | None = None  # steps after which the user presses Ctrl-C
    inspector: str = '{"Layers": []}'
    networks: list[Network] = field(default_factory=list)
    configs: list[Config] = field(default_factory=list)

    @property
    def number(self) -> tuple[int, int]:
        major, minor, *_ = (int(part) for part in self.library.version.split("."))
        return major, minor

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeBuilders:
        for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
            monkeypatch.delitem(sys.modules, name)  # it keeps the tensorrt that it saw first
        self.library.install(monkeypatch)
        module: Any = sys.modules["tensorrt"]
        old, new = self.number < (10, 0), self.number >= (11, 0)
        module.Builder = lambda logger: Builder(self, logger)
        module.OnnxParser = Parser
        module.BuilderFlag = OldFlags if old else MidFlags if self.number < (10, 2) else NewFlags
        module.NetworkDefinitionCreationFlag = OldCreation if old else NewCreation if new else MidCreation
        module.LayerType = OldLayers if self.number < (10, 14) else NewLayers
        module.MemoryPoolType, module.ProfilingVerbosity = MemoryPoolType, Verbosity
        module.LayerInformationFormat, module.DeviceType, module.float32 = Format, DeviceType, "float32"
        if old:
            module.PreviewFeature = Previews
        else:
            module.IProgressMonitor, module.IAttentionInputLayer = IProgressMonitor, IAttentionInputLayer
        self._inspect(monkeypatch, old)
        return self

    def _inspect(self, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
        shown = SimpleNamespace(get_engine_information=lambda kind: self.inspector)
        monkeypatch.setattr(fake_tensorrt.Engine, "create_engine_inspector", lambda engine: shown, raising=False)
        if not old:
            size = property(lambda engine: engine.activations)
            monkeypatch.setattr(fake_tensorrt.Engine, "device_memory_size_v2", size, raising=False)


class Builder:
    def __init__(self, builders: FakeBuilders, logger: Any) -> None:
        must_start(builders.library, logger)
        self.builders, self.logger = builders, logger

    def create_network(self, flags: int = 0) -> Network:
        self.builders.networks.append(Network(self.builders, flags))
        return self.builders.networks[-1]

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def create_builder_config(self) -> Config:
        self.builders.configs.append(Config(self.builders))
        return self.builders.configs[-1]

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        builders = self.builders
        if not self._progress(config) or builders.failure:
            for message in builders.failure:
                self.logger.log(Severity.ERROR, message)
            return None
        self.logger.log(Severity.WARNING, "Detected layernorm nodes in FP16.")
        if config.timing_cache is not None:
            config.timing_cache.content += b"timed;"
        path = builders.built_instead or network.path
        assert path is not None
        gpu = builders.library.gpu.name
        return fake_plan(path, config.profile(), tensorrt=builders.library.version, gpu=gpu)

    def _progress(self, config: Config) -> bool:
        """Phases as TensorRT has them; False if the monitor stopped the build.  An exception in the monitor would end
        the process."""
        monitor = config.progress_monitor
        if monitor is None:
            return True
        try:
            monitor.phase_start("Building engine", None, 2)
            monitor.phase_start("Tactic selection", "Building engine", 3)
            for step in range(3):
                if not monitor.step_complete("Tactic selection", step):
                    return False
            monitor.phase_finish("Tactic selection")
            monitor.phase_finish("Building engine")
        except BaseException as error:
            pytest.fail(f"terminate called after throwing {error!r}")
        return True


class Network:
    def __init__(self, builders: FakeBuilders, flags: int) -> None:
        self.builders, self.flags = builders, flags
        self.path: Path | None = None
        self.layers: list[Any] = []
        self.inputs: list[Any] = []
        self.weights: set[str] = set()
        self.exchangeable: set[str] = set()

    def mark_weights_refittable(self, name: str) -> bool:
        self.exchangeable |= {name} & self.weights
        return name in self.weights

    def __iter__(self) -> Any:
        return iter(self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_layer(self, index: int) -> Any:
        return self.layers[index]

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_flag(self, flag: int) -> bool:
        return bool(self.flags >> int(flag) & 1)


class Layer:
    """A layer as TensorRT gives it out: typed as its base class until told otherwise."""

    def __init__(self, name: str, kind: Any) -> None:
        self.name, self.type = name, kind
        self.precision_is_set = False
        self.num_outputs = 1
        self.output_types: dict[int, Any] = {}
        self.attention = SimpleNamespace(decomposable=False)

    def set_output_type(self, index: int, dtype: Any) -> None:
        self.output_types[index] = dtype


class AttentionInputLayer(IAttentionInputLayer, Layer):
    pass


class Parser:
    """Complains as the real one of its version would; what the real one silently gets wrong is an error, too."""

    def __init__(self, network: Network, logger: Any) -> None:
        self.network, self.logger = network, logger
        self.errors: list[str] = []

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path, load_external_data=False)
        number = self.network.builders.number
        limit = max(opset for version, opset in OPSETS.items() if version <= number)
        if model.opset_import[0].version > limit:
            self.errors.append(f"opset {model.opset_import[0].version} is newer than {limit}")
        for index, node in enumerate(model.graph.node):
            self._check(index, node, number)
            kind = sys.modules["tensorrt"].LayerType
            attention = node.op_type == "Attention" and number >= SINCE["Attention"]
            softmax = kind.SOFTMAX if node.op_type == "Softmax" else kind.OTHER
            layer = Layer(node.name, kind.ATTENTION_INPUT if attention else softmax)
            self.network.layers.append(layer)
        self.network.inputs = list(self._inputs(model))
        self.network.weights = {tensor.name for tensor in model.graph.initializer}
        self.network.path = Path(path)
        return not self.errors

    def _check(self, index: int, node: onnx.NodeProto, number: tuple[int, int]) -> None:
        if number < SINCE.get(node.op_type, (0, 0)) or node.domain:
            self.errors.append(
                f"In node {index} with name: {node.name} and operator: {node.op_type} (checkFallbackPluginImporter): "
                'UNSUPPORTED_NODE: Assertion failed: creator && "Plugin not found, are the plugin name, version, and '
                'namespace correct?"'
            )
        if node.op_type == "Shape" and node.attribute and number < (10, 0):
            self.errors.append(f"{node.name}: start and end are ignored before 10.0")

    def _inputs(self, model: onnx.ModelProto) -> Iterable[Any]:
        for value in model.graph.input:
            tensor = value.type.tensor_type
            shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
            yield SimpleNamespace(name=value.name, shape=shape, dtype=tensor.elem_type, is_shape_tensor=False)

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> str:
        return self.errors[index]


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, ShapeRange] = {}

    def set_shape(self, name: str, low: Any, tuned: Any, high: Any) -> None:
        self.shapes[name] = ShapeRange(tuple(low), tuple(tuned), tuple(high))


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def combine(self, other: TimingCache, ignore_mismatch: bool) -> bool:
        return True

    def serialize(self) -> Any:
        return memoryview(self.content)


class Config:
    """An IBuilderConfig: everything that it is told is kept."""

    def __init__(self, builders: FakeBuilders) -> None:
        self.builders = builders
        self.flags = {"TF32"}  # TensorRT's default
        self.pools: dict[Any, int] = {}
        self.previews: dict[Any, bool] = {}
        self.profiles: list[Profile] = []
        self.timing_cache: TimingCache | None = None
        self.loaded_cache = b""
        self.progress_monitor: Any = None
        self.DLA_core, self.default_device_type = -1, DeviceType.GPU
        self.engine_capability, self.profiling_verbosity = "STANDARD", Verbosity.LAYER_NAMES_ONLY

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def profile(self) -> dict[str, ShapeRange]:
        (only,) = self.profiles
        return only.shapes

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self.flags

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.pools[pool] = size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self.pools.get(pool, 0)

    def set_preview_feature(self, feature: Any, on: bool) -> None:
        self.previews[feature.name] = on

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: Any) -> TimingCache:
        self.loaded_cache = bytes(content)
        return TimingCache(self.loaded_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.timing_cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.timing_cache
