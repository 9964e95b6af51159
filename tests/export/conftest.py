"""A small random Stable Diffusion checkpoint, and its four networks exported once a session in both precisions."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from sd_export.exporter import export
from sd_export.graphs.precision import to_float16
from sd_export.graphs.trace import trace
from sd_export.graphs.weights import save
from sd_export.networks.registry import REQUIRED, find
from sd_export.options import ExportOptions
from sd_export.signature import Signature
from sd_export.source import Checkpoint, resolve_checkpoint
from sd_export.source.resolve import DEMO_FOLDER
from sd_runtime.tensor import Array, Dim
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

END_OF_TEXT = 601  # in the demo's vocabulary


@dataclass(frozen=True)
class Traced:
    """One network as torch runs it, and the file of its graph."""

    module: torch.nn.Module
    signature: Signature
    graph: Path

    @property
    def weights(self) -> Path:
        return self.graph.with_name("model.safetensors")

    def feeds(self, sizes: dict[str, int], seed: int = 0) -> dict[str, Array]:
        """Random inputs; `sizes` gives the varying axes by symbol."""
        random = np.random.default_rng(seed)
        feeds: dict[str, Array] = {}
        sizes = {"timesteps": 1} | sizes
        for spec in self.signature.inputs:
            shape = [sizes[axis.symbol] if isinstance(axis, Dim) else axis for axis in spec.shape]
            if spec.name == "input_ids":
                feeds[spec.name] = random.integers(0, END_OF_TEXT, shape)
                feeds[spec.name][:, -3:] = END_OF_TEXT
            elif spec.name == "timestep":
                feeds[spec.name] = np.full(shape, 417.25, np.float32)
            else:
                feeds[spec.name] = random.standard_normal(shape, np.float32)
        return feeds

    def reference(self, feeds: dict[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            outputs = self.module(*(torch.from_numpy(feed) for feed in feeds.values()))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: out.numpy() for spec, out in zip(self.signature.outputs, outputs, strict=True)}

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        session = onnxruntime.InferenceSession(str(self.graph), providers=["CPUExecutionProvider"])
        names = [spec.name for spec in self.signature.outputs]
        return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def jitter(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Make the norms and biases of an untrained network differ: the exporter stores equal tensors once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In diffusers layout: two levels of UNet, four of VAE (8 pixels a cell), the demo's tokenizer."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=128,
    )
    text = CLIPTextConfig(
        vocab_size=END_OF_TEXT + 1,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=24,
        bos_token_id=END_OF_TEXT - 1,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
    )
    text_encoder = CLIPTextModel(text)
    for seed, module in enumerate((unet, vae, text_encoder)):
        jitter(module, seed)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-model"
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer"),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, skip_prk_steps=True
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_folder: Path) -> Checkpoint:
    return resolve_checkpoint(str(tiny_folder))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the tiny checkpoint exported in float32; tests must not change it."""
    return export(ExportOptions(str(tiny_folder), output=tmp_path_factory.mktemp("bundles") / "tiny"))


@pytest.fixture(scope="session")
def traced(
    tiny_bundle: Path, tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Traced]:
    """traced(component, "fp32" | "fp16"): from the bundle, or converted as the export converts."""
    halves = tmp_path_factory.mktemp("halves")

    @functools.cache
    def get(name: str, precision: str) -> Traced:
        network = find(name).load(tiny_checkpoint)
        single = Traced(network.module, network.signature, tiny_bundle / name / "model.onnx")
        return single if precision == "fp32" else halved(single, halves / name)

    return get


def halved(single: Traced, folder: Path) -> Traced:
    """The same network with its graph in float16, written to `folder`."""
    model = ir.load(single.graph)
    to_float16(model)
    return written(single.module, single.signature, model, folder)


def written(module: torch.nn.Module, signature: Signature, model: ir.Model, folder: Path) -> Traced:
    folder.mkdir()
    save(model, folder / "model.onnx", folder / "model.safetensors")
    return Traced(module, signature, folder / "model.onnx")


@pytest.fixture
def trace_module(tmp_path: Path) -> Callable[[torch.nn.Module, Signature, str], dict[str, Traced]]:
    """trace_module(module, signature, root) → the module's graph in each precision."""

    def get(module: torch.nn.Module, signature: Signature, root: str = "") -> dict[str, Traced]:
        module.eval().requires_grad_(False)
        single = written(module, signature, trace(module, signature, root=root, pixels=8), tmp_path / "fp32")
        return {"fp32": single, "fp16": halved(single, tmp_path / "fp16")}

    return get


@pytest.fixture(scope="session", params=REQUIRED)
def component(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny-model"))
