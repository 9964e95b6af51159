"""Export a checkpoint of Stable Diffusion 1.5's true sizes (random weights), and measure what that takes and gives:
time and peak memory of the export, each component against torch at a shape other than the traced one, one picture.

    python scripts/true_size.py [--folder DIR] [--precision fp32 fp16] [--tensorrt rtx]

With --tensorrt rtx, engines of TensorRT for RTX are built from each bundle instead, without a GPU: a row of a table for
each says how long that took, how much memory, and what the builder says of the engine.

Needs about 8 GB of memory and, for both precisions, 10 GB of disk in --folder (default: a temporary one); 5 to 15
minutes on two cores.  Exit code 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sd_export.tensorrt_.plan import EngineBuild
    from sd_runtime.bundle.manifest import EnginePrecision

MEMORY_LIMIT = 8e9  # bytes resident at the peak of an export
CELLS = 32  # latent height and width of the comparison: 256 × 256 pixels
LIMITS = {"fp32": 1e-5, "fp16": 3e-3}  # relative errors
ENGINE_PRECISIONS: dict[str, tuple[EnginePrecision, ...]] = {
    "fp32": ("fp32", "bf16"),
    "fp16": ("fp16",),
}  # of a bundle's engines
DECODER_CELLS = 64  # the decoder's float32 limit grows with the side of the picture: 1e-5 at 8 × 8 cells


@dataclass(frozen=True)
class Difference:
    """‖ours − torch's‖ / ‖torch's‖ for one output of one component."""

    component: str
    output: str
    error: float
    limit: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint and the bundles; a second run reuses them")
    parser.add_argument("--precision", nargs="+", choices=tuple(LIMITS), default=["fp32"])
    parser.add_argument("--tensorrt", choices=("rtx",), help="build engines instead of comparing networks with torch")
    args = parser.parse_args()
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
        return measure(args.folder, args.precision, engines=args.tensorrt is not None)
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), args.precision, engines=args.tensorrt is not None)


def measure(folder: Path, precisions: list[str], *, engines: bool) -> int:
    """Print one line a measurement; 1 if one is over its limit."""
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "model_index.json").exists():
        isolated(make_checkpoint, checkpoint)
    good = True
    for precision in precisions:
        bundle = folder / precision
        start = time.perf_counter()
        _, peak = isolated(export_all, checkpoint, bundle, precision)
        good &= peak < MEMORY_LIMIT
        print(f"{precision} export: {time.perf_counter() - start:.0f} s, peak memory {peak / 1e9:.2f} GB", flush=True)
        if engines:
            build_engines(bundle, ENGINE_PRECISIONS[precision])
            continue
        for component in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
            differences, _ = isolated(compare, checkpoint, bundle, component, precision)
            for d in differences:
                good &= d.error < d.limit
                print(f"{precision} {d.component} {d.output}: {d.error:.1e} (limit {d.limit:.0e})", flush=True)
        seconds, peak = isolated(draw, bundle)
        print(f"{precision} picture, 256 x 256, 4 steps: {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB", flush=True)
    return 0 if good else 1


def isolated(function: Callable[..., Any], *arguments: object) -> tuple[Any, int]:
    """The function's result in a process of its own, and the most memory (bytes) that process had resident."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, function, arguments).result()


def _with_peak(function: Callable[..., Any], arguments: tuple[object, ...]) -> tuple[Any, int]:
    result = function(*arguments)
    unit = 1 if sys.platform == "darwin" else 1024
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_checkpoint(folder: Path) -> None:
    """Stable Diffusion 1.5's configs, random float16 weights, CLIP's vocabulary, in diffusers layout."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from sd_export.source import tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as files:
        for name, content in tokenizer.clip().items():
            Path(files, name).write_bytes(content)
        clip_tokenizer = CLIPTokenizer.from_pretrained(files)
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        bos_token_id=0,
        eos_token_id=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    networks = {"text_encoder": CLIPTextModel(text), "vae": vae, "unet": unet}
    for network in networks.values():
        _jitter(network)
        network.half()
    StableDiffusionPipeline(
        **networks,
        tokenizer=clip_tokenizer,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _jitter(network: Any) -> None:
    """Make the norms and biases of an untrained network differ, as a trained one's do."""
    import torch

    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)


def export_all(checkpoint: Path, bundle: Path, precision: Literal["fp32", "fp16"]) -> None:
    from sd_export.exporter import export
    from sd_export.options import ExportOptions

    export(ExportOptions(str(checkpoint), output=bundle, precision=precision), quiet=False)


def build_engines(bundle: Path, precisions: Sequence[EnginePrecision]) -> None:
    """Print a row for each network's engines: exact ones for 512 × 512 pixels, whose UNet takes 1 or 2 rows, and
    dynamic ones.  Each is built in a process of its own, and thrown away."""
    print("| engine | form | build | peak memory | engine | launches | read and written | fused | activations |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for precision in precisions:
        labels, _ = isolated(planned_labels, bundle, precision)
        for label in labels:
            row, peak = isolated(build_engine, bundle, precision, label)
            print(row.format(peak=f"{peak / 1e9:.1f} GB"), flush=True)


def planned_labels(bundle: Path, precision: EnginePrecision) -> list[str]:
    return [build.label for build in planned_engines(bundle, precision)]


def planned_engines(bundle: Path, precision: EnginePrecision) -> list[EngineBuild]:
    """Of the networks that have weights."""
    from sd_export.tensorrt_.plan import BuildOptions, plan_builds
    from sd_export.tensorrt_.portable import import_rtx
    from sd_runtime.bundle.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    options = BuildOptions(bundle, precision=precision, fallback=True, library="tensorrt_rtx")
    builds = plan_builds(manifest, options, str(import_rtx().__version__))
    return [build for build in builds if manifest.components[build.component].weights is not None]


def build_engine(bundle: Path, precision: EnginePrecision, label: str) -> str:
    """A row of the table, but for the {peak} of memory."""
    from sd_export.tensorrt_.launches import FUSED_ATTENTION
    from sd_export.tensorrt_.portable import build_portable

    (planned,) = (build for build in planned_engines(bundle, precision) if build.label == label)
    start = time.perf_counter()
    built = build_portable(label, bundle / planned.graph.path, planned.profile)
    seconds, account = time.perf_counter() - start, built.account
    exact = all(allowed.min == allowed.max for allowed in planned.profile.values())
    moved = f"{account.bytes / 1e6:.0f} MB" if exact else "not known"
    return (
        f"| {label} | `{planned.form}`, {precision} | {seconds:.0f} s | {{peak}} | {len(built.plan) / 1e6:.0f} MB | "
        f"{len(account.launches)} | {moved} | {account.of(FUSED_ATTENTION)} of {built.attentions} | "
        f"{account.activations / 1e6:.0f} MB |"
    )


def compare(checkpoint: Path, bundle: Path, component: str, precision: str) -> list[Difference]:
    """One component against torch in float32, on random inputs."""
    import numpy as np
    import onnxruntime
    import torch
    from sd_export.networks.registry import find
    from sd_export.source import resolve_checkpoint
    from sd_runtime.bundle.manifest import Manifest
    from sd_runtime.tensor import Array, Dim

    sizes = {"batch": 2, "latent_height": CELLS, "latent_width": CELLS, "height": 8 * CELLS, "width": 8 * CELLS}
    graph = Manifest.from_bytes((bundle / "manifest.json").read_bytes()).components[component].graph()
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for spec in graph.inputs:
        shape = [sizes.get(axis.symbol, axis.min) if isinstance(axis, Dim) else axis for axis in spec.shape]
        feeds[spec.name] = random.standard_normal(shape, np.float32)
    if "timestep" in feeds:
        feeds["timestep"][:] = 501.5
    if "input_ids" in feeds:
        feeds["input_ids"] = random.integers(0, 49407, feeds["input_ids"].shape)
        feeds["input_ids"][:, 20:] = 49407
    network = find(component).load(resolve_checkpoint(str(checkpoint))).module
    with torch.no_grad():
        outputs = network(*(torch.from_numpy(feed) for feed in feeds.values()))
    expected = [output.double().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
    del network, outputs
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(bundle / graph.path), options, providers=["CPUExecutionProvider"])
    got = session.run([spec.name for spec in graph.outputs], feeds)
    limit = LIMITS[precision]
    if component == "vae_decoder" and precision == "fp32":
        limit *= (CELLS * CELLS / DECODER_CELLS) ** 0.5
    return [
        Difference(component, spec.name, float(np.linalg.norm(g - e) / np.linalg.norm(e)), limit)
        for spec, g, e in zip(graph.outputs, got, expected, strict=True)
    ]


def draw(bundle: Path) -> float:
    """One picture by the runtime; seconds it took.  The pipeline itself refuses NaN."""
    from sd_runtime import Pipeline

    start = time.perf_counter()
    with Pipeline.load(bundle) as pipeline:
        pipeline("a photograph of a lighthouse", num_inference_steps=4, height=256, width=256, seed=0)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
