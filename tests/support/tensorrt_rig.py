"""A tiny UNet and the sampler step as engines of a fake TensorRT, and the same graphs for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import pytest
from fake_cuda import FakeGpu
from fake_tensorrt import FakeTensorRT, fake_plan
from sd_export.graphs.step_graph import step_graph, step_signature
from sd_export.signature import Sizes
from sd_runtime.bundle.bundle import GraphFiles
from sd_runtime.bundle.manifest import EngineRecord, Graph, ShapeRange, Target
from sd_runtime.engines.gpu.gpu import Gpu
from sd_runtime.engines.onnxruntime_.cpu import OnnxRuntimeEngine
from sd_runtime.engines.onnxruntime_.cuda import OnnxRuntimeCudaEngine
from sd_runtime.engines.tensorrt_.engine import TensorRTEngine
from sd_runtime.engines.tensorrt_.library import TensorRT
from sd_runtime.tensor import Dim, TensorSpec
from tiny_graphs import CHANNELS, TOKENS, WIDTH, unet_graph, unet_signature

VERSIONS = ("8.5.3", "8.6.1", "10.0.1", "10.13.3", "11.4.0")
SIZES = Sizes(channels=CHANNELS, pixels=8, cells=16, positions=TOKENS, width=WIDTH)
REBUILD = "sd-export build bundle"
FORMS = ("guided", "plain")


def whole_range(specs: tuple[TensorSpec, ...]) -> dict[str, ShapeRange]:
    """A profile of everything that a graph declares."""
    sizes = {spec.name: [a if isinstance(a, Dim) else Dim("", a, a, a) for a in spec.shape] for spec in specs}
    return {
        name: ShapeRange(tuple(a.min for a in axes), tuple(a.opt for a in axes), tuple(a.max for a in axes))
        for name, axes in sizes.items()
        if any(a.min < a.max for a in axes)
    }


def exact_range(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ShapeRange]:
    return {name: ShapeRange(shape, shape, shape) for name, shape in shapes.items()}


def unet_shapes(rows: int, height: int = 8, width: int = 9, tokens: int = TOKENS) -> dict[str, tuple[int, ...]]:
    return {
        "sample": (rows, CHANNELS, height, width),
        "timestep": (rows,),
        "encoder_hidden_states": (rows, tokens, WIDTH),
    }


@dataclass
class Rig:
    """A machine with a GPU and TensorRT, a folder with graphs and engines, and the runtime's engines on them."""

    folder: Path
    version: str
    fake_gpu: FakeGpu
    fake: FakeTensorRT
    gpu: Gpu = field(init=False)
    library: TensorRT = field(init=False)

    def __post_init__(self) -> None:
        self.gpu, self.library = Gpu(), TensorRT()

    def save(self, name: str, model: onnx.ModelProto) -> Path:
        path = self.folder / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    def record(
        self, component: str, form: str, graph: Path, profile: dict[str, ShapeRange], activations: int = 4096
    ) -> EngineRecord:
        """An engine on disk and its entry in a manifest."""
        path = f"{component}-{form}-{len(list(self.folder.glob('*.plan')))}.plan"
        plan = fake_plan(graph, profile, tensorrt=self.version, gpu=self.fake_gpu.name, activations=activations)
        (self.folder / path).write_bytes(plan)
        target = Target(self.fake_gpu.name, "9.0", self.version, "13.0", "580.65.6")
        return EngineRecord(component, form, path, "fp32", profile, target, "graph", None, False, activations)

    def engine(self, graph: Graph, *records: EngineRecord) -> TensorRTEngine:
        return TensorRTEngine(self.library, self.gpu, graph, records, self.read, REBUILD)

    def read(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def unet(self, *profiles: dict[str, ShapeRange], activations: int = 4096) -> TensorRTEngine:
        """The tiny UNet, built for each of the profiles; by default for all that it takes."""
        path, graph = self.save("unet", unet_graph()), unet_signature()
        wanted = profiles or (whole_range(graph.inputs),)
        return self.engine(graph, *(self.record("unet", "plain", path, p, activations) for p in wanted))

    def steps(self) -> dict[str, TensorRTEngine]:
        """The sampler step in both forms."""
        engines = {}
        for form in FORMS:
            path = self.save(f"step-{form}", step_graph(SIZES, guided=form == "guided"))
            signature = step_signature(SIZES, guided=form == "guided")
            record = self.record("sampler_step", form, path, whole_range(signature.inputs), 512)
            engines[form] = self.engine(Graph(path.name, signature.inputs, signature.outputs), record)
        return engines


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rig(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    gpu = FakeGpu().install(monkeypatch)
    return Rig(tmp_path, version, gpu, FakeTensorRT(gpu, version).install(monkeypatch))


def onnxruntime_unet() -> OnnxRuntimeEngine:
    graph = unet_signature()
    return OnnxRuntimeEngine(files(unet_graph()), graph.inputs, graph.outputs, threads=1)


def files(model: onnx.ModelProto) -> GraphFiles:
    """A graph that needs no weights."""
    return GraphFiles("model.onnx", model.SerializeToString(), Path())


def onnxruntime_cuda_unet(gpu: Gpu) -> OnnxRuntimeCudaEngine:
    graph = unet_signature()
    return OnnxRuntimeCudaEngine(gpu, files(unet_graph()), graph.inputs, graph.outputs)


def onnxruntime_cuda_steps(gpu: Gpu) -> dict[str, OnnxRuntimeCudaEngine]:
    engines = {}
    for form in FORMS:
        signature = step_signature(SIZES, guided=form == "guided")
        model = files(step_graph(SIZES, guided=form == "guided"))
        engines[form] = OnnxRuntimeCudaEngine(gpu, model, signature.inputs, signature.outputs)
    return engines
