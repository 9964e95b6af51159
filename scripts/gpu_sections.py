"""What scripts/gpu_check.py checks and times, one function a section; each runs in a process of its own.

A section returns rows.  A row with a limit has passed or failed; the others are figures.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gpu_timing import DEMO, CheckOptions, Row, latencies

if TYPE_CHECKING:
    from sd_runtime import Pipeline
    from sd_runtime.tensor import TensorSpec

PROMPT, SEED, GUIDANCE = "a large red star on a blue background", 5, 4.0
COMPONENTS = ("text_encoder", "unet", "vae_decoder")
ENGINES = {"tensorrt": "TensorRTEngine", "onnxruntime": "OnnxRuntimeCudaEngine"}
# torch.manual_seed(0); torch.randn(8, device="cuda"), on any GPU, as printed: to five digits
KNOWN_NOISE = (-0.92466, -0.42534, -2.6438, 0.14518, -0.12087, -0.57972, -0.62285, -0.32839)


# ---- what is right ---------------------------------------------------------------------------------------------------


def noise(settings: CheckOptions) -> Iterator[Row]:
    """--rng cuda against known values, and against this GPU's torch where there is one."""
    from sd_runtime.noise import CUDAGenerator

    ours = CUDAGenerator(0).randn((8,))
    yield Row("noise: 8 known CUDA values, largest difference", float(np.abs(ours - KNOWN_NOISE).max()), "", 6e-5)
    if not settings.dry and importlib.util.find_spec("torch"):
        import torch

        generator = torch.Generator("cuda").manual_seed(7)
        theirs = torch.randn((4, 4, 64, 64), generator=generator, device="cuda").cpu().numpy()
        difference = float(np.abs(CUDAGenerator(7).randn((4, 4, 64, 64)) - theirs).max())
        yield Row("noise: 65536 values of this GPU's torch, largest difference", difference, "", 1e-5)


def demo_export(settings: CheckOptions) -> Iterator[Row]:
    from sd_export.exporter import export
    from sd_export.options import ExportOptions

    precisions: tuple[Literal["fp32", "fp16"], ...] = ("fp32",) if settings.dry else ("fp32", "fp16")
    for precision in precisions:
        start = time.perf_counter()
        export(ExportOptions("demo", output=settings.work / f"demo-{precision}", precision=precision))
        yield Row(f"demo: export {precision}", time.perf_counter() - start, "s")


def demo_onnxruntime(settings: CheckOptions) -> Iterator[Row]:
    for bundle, error, likeness in (
        (settings.work / "demo-fp32", 1e-4, 45.0),
        (settings.work / "demo-fp16", 2e-2, 25.0),
    ):
        if bundle.is_dir():
            yield from _right(settings, bundle, "onnxruntime", error, likeness)


def demo_tensorrt(settings: CheckOptions) -> Iterator[Row]:
    for precision, error, likeness in (("fp32", 1e-3, 40.0), ("fp16", 2e-2, 25.0)):
        if (settings.work / f"demo-{precision}").is_dir():
            bundle, seconds = _with_engines(settings.work / f"demo-{precision}", "--size", "128x128")
            yield Row(f"demo {precision}, tensorrt: build", seconds, "s")
            yield from _right(settings, bundle, "tensorrt", error, likeness)


def _right(settings: CheckOptions, bundle: Path, library: str, error: float, likeness: float) -> Iterator[Row]:
    """Components against ONNX Runtime on the CPU, a picture against diffusers on this device."""
    from sd_runtime import Pipeline

    label = f"{bundle.name.replace('-tensorrt', '')}, {library}"
    with warnings_of(label) as warned, Pipeline.load(bundle, device=settings.device) as pipeline:
        yield from _components(settings, pipeline, label, library, 16, error)
        drawn = pipeline(PROMPT, seed=SEED, num_inference_steps=10, guidance_scale=GUIDANCE, scheduler="ddim")
        yield from warned()
    if importlib.util.find_spec("diffusers"):
        theirs = _diffusers_picture(settings.device)
        yield Row(f"{label}: picture like diffusers'", decibels(drawn.images[0], theirs), "dB", likeness, at_least=True)


def _components(
    settings: CheckOptions, pipeline: Pipeline, label: str, library: str, cells: int, error: float
) -> Iterator[Row]:
    """Each network, run by `library`, against ONNX Runtime on the CPU, if it is there; latents are `cells` × `cells`.

    SystemExit: something else runs it."""
    from sd_runtime.engines.onnxruntime_.backend import cpu_engine

    random = np.random.default_rng(0)
    for name in COMPONENTS:
        engine = pipeline.engines.engine(name)
        if not settings.dry and ENGINES[library] != type(engine).__name__:
            raise SystemExit(f"{label}: {name} is run by {type(engine).__name__}, not by {library}")
        if importlib.util.find_spec("onnxruntime") is None:
            continue
        graph = pipeline.bundle.component(name).graph()
        feeds = {spec.name: _values(spec, cells, random) for spec in graph.inputs}
        reference = cpu_engine(pipeline.bundle, name, "plain")
        output = next(iter(graph.outputs)).name
        expected = reference.run(dict(feeds))[output]
        reference.close()
        got = engine.run(dict(feeds))[output]
        difference = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        yield Row(f"{label}: {name}, relative difference to the CPU", difference, "", error)


@contextmanager
def warnings_of(label: str) -> Iterator[Callable[[], Iterator[Row]]]:
    """A row for what the runtime warns of meanwhile, none of which is right: that another library stands in, say."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sd_runtime")
    logger.addHandler(handler)

    def row() -> Iterator[Row]:
        yield Row(f"{label}: warnings", len({*said}), "", 0)

    try:
        yield row
    finally:
        logger.removeHandler(handler)


def _values(spec: TensorSpec, cells: int, random: np.random.Generator) -> Any:
    sizes = {"latent_height": cells, "latent_width": cells, "sequence_length": 77}
    rows = 1 if spec.name == "latent_sample" else 2  # pictures are decoded one by one; guidance has two rows for each
    shape = tuple(axis if isinstance(axis, int) else sizes.get(axis.symbol, rows) for axis in spec.shape)
    if spec.name == "timestep":
        return np.full(shape, 501, np.float32)
    return random.integers(0, 256, shape) if spec.dtype == "int64" else random.standard_normal(shape, np.float32)


def decibels(ours: Any, theirs: Any) -> float:
    """PSNR of two pictures of 8 bits a channel."""
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return float(10 * np.log10(255**2 / max(float((difference**2).mean()), 1e-10)))


def _diffusers_picture(device: str) -> Any:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.backends.cudnn.allow_tf32 = False
    pipe = StableDiffusionPipeline.from_pretrained(DEMO).to(device, torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    return pipe(PROMPT, num_inference_steps=10, guidance_scale=GUIDANCE, generator=generator).images[0]


# ---- what is fast ----------------------------------------------------------------------------------------------------


def sd15_export(settings: CheckOptions) -> Iterator[Row]:
    """Random weights: arithmetic takes as long on them as on any."""
    from sd_export.exporter import export
    from sd_export.options import ExportOptions

    checkpoint = _checkpoint(settings)
    start = time.perf_counter()
    precision: Literal["fp32", "fp16"] = "fp32" if settings.dry else "fp16"
    export(ExportOptions(str(checkpoint), output=settings.work / "sd15", precision=precision))
    yield Row("sd15: export", time.perf_counter() - start, "s")


def sd15_onnxruntime(settings: CheckOptions) -> Iterator[Row]:
    yield from _fast(settings, settings.work / "sd15", "onnxruntime", settings.batches)


def sd15_tensorrt(settings: CheckOptions) -> Iterator[Row]:
    yield from _built(settings, settings.batches[:1])


def sd15_tensorrt_batch(settings: CheckOptions) -> Iterator[Row]:
    """Several pictures at once, for which engines of their own take as long to build."""
    yield from _built(settings, settings.batches[1:])


def _built(settings: CheckOptions, batches: Sequence[int]) -> Iterator[Row]:
    side, asked = settings.sides, ",".join(map(str, batches))
    bundle, seconds = _with_engines(
        settings.work / "sd15", "--size", f"{side}x{side}", "--batch", asked, "--no-fallback"
    )
    yield Row(f"sd15, tensorrt: build for batch {asked}", seconds, "s")
    yield from _fast(settings, bundle, "tensorrt", batches)


def _checkpoint(settings: CheckOptions) -> Path:
    """The large one, made when it is first needed."""
    from true_size import make_checkpoint

    if not (settings.checkpoint / "model_index.json").exists():
        make_checkpoint(settings.checkpoint)
    return settings.checkpoint


def _with_engines(source: Path, *flags: str) -> tuple[Path, float]:
    """A copy of a bundle (hard links) with engines for this machine, and the seconds that building took."""
    bundle = source.with_name(f"{source.name}-tensorrt")
    if not bundle.exists():
        partial = bundle.with_name(f".{bundle.name}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=os.link)
        (partial / "manifest.json").unlink()  # it will differ
        shutil.copy(source / "manifest.json", partial)
        partial.rename(bundle)
    start = time.perf_counter()
    command = [sys.executable, "-c", "import sys; from sd_export.cli import main; sys.exit(main(sys.argv[1:]))"]
    done = subprocess.run([*command, "build", str(bundle), *flags], check=False)
    if done.returncode:
        raise SystemExit(f"building engines for {source.name} failed; see above")
    return bundle, time.perf_counter() - start


def _fast(settings: CheckOptions, bundle: Path, library: str, batches: Sequence[int]) -> Iterator[Row]:
    """With the first batch: whether it is right, how it starts, and the decoder, too."""
    from sd_export.tensorrt_.check import milliseconds
    from sd_runtime import Pipeline
    from sd_runtime.engines.device import DeviceEngine

    label, side, first = f"sd15, {library}", settings.sides, batches[0] == settings.batches[0]
    for which in ("first", "again") if first else ():
        seconds = _cold(settings, bundle)
        yield Row(f"{label}: new process to picture on disk, {settings.steps[0]} steps, {which}", seconds, "s")
    start = time.perf_counter()
    with warnings_of(label) as warned, Pipeline.load(bundle, device=settings.device) as pipeline:
        yield Row(f"{label}: load", time.perf_counter() - start, "s")

        def draw(steps: int, batch: int, scheduler: str | None = None) -> Any:
            return pipeline(
                PROMPT,
                seed=SEED,
                num_inference_steps=steps,
                num_images_per_prompt=batch,
                guidance_scale=GUIDANCE,
                height=side,
                width=side,
                scheduler=scheduler,
            )

        if first:
            yield from _components(settings, pipeline, label, library, side // 8, 2e-2)
            draw(settings.steps[0], 1, "ddim").images[0].save(settings.work / f"sd15-{library}.png")
            decoder = pipeline.engines.engine("vae_decoder")
            if isinstance(decoder, DeviceEngine):
                latents = np.random.default_rng(0).standard_normal((1, 4, side // 8, side // 8), np.float32)
                yield Row(f"{label}: VAE decoder, one picture", milliseconds(decoder, {"latent_sample": latents}), "ms")
        yield from latencies(settings, label, draw, batches)
        yield from warned()


def _cold(settings: CheckOptions, bundle: Path) -> float:
    code = "import sys; from sd_runtime.cli.run import main; sys.exit(main(sys.argv[1:]))"
    with tempfile.TemporaryDirectory() as folder:
        size = [f"--{name}={settings.sides}" for name in ("width", "height")]
        flags = [
            "--model",
            str(bundle),
            "--device",
            settings.device,
            "--steps",
            str(settings.steps[0]),
            *size,
            "--quiet",
        ]
        command = [sys.executable, "-c", code, PROMPT, *flags, "--output", str(Path(folder, "picture.png"))]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        return time.perf_counter() - start


# ---- the others ------------------------------------------------------------------------------------------------------


def diffusers_eager(settings: CheckOptions) -> Iterator[Row]:
    """Also the reference of the pictures that were drawn before."""
    from diffusers import DDIMScheduler
    from PIL import Image

    pipe = _pipe(settings)
    own, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    theirs = _drawing(settings, pipe)(settings.steps[0], 1).images[0]
    for library in ENGINES:
        picture = settings.work / f"sd15-{library}.png"
        if picture.exists():
            with Image.open(picture) as ours:
                yield Row(f"sd15, {library}: picture like diffusers'", decibels(ours, theirs), "dB", 25, at_least=True)
    pipe.scheduler = own
    yield from latencies(settings, "sd15, diffusers eager", _drawing(settings, pipe))


def torch_compile(settings: CheckOptions) -> Iterator[Row]:
    """Quickly compiled: CUDA graphs, but nothing tried out."""
    yield from _compiled(settings, "reduce-overhead")


def torch_compile_max(settings: CheckOptions) -> Iterator[Row]:
    """Compiled at leisure, which takes minutes."""
    yield from _compiled(settings, "max-autotune")


def _compiled(settings: CheckOptions, mode: str) -> Iterator[Row]:
    """As its users run it: channels last, batch 1 only, for every shape compiles anew."""
    import torch

    pipe = _pipe(settings)
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)
    draw, label = _drawing(settings, pipe), f"sd15, torch.compile {mode}"
    start = time.perf_counter()
    draw(settings.steps[0], 1)
    yield Row(f"{label}: compilation", time.perf_counter() - start, "s")
    yield from latencies(settings, label, draw, batches=(1,))


def _pipe(settings: CheckOptions) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = torch.float32 if settings.dry else torch.float16
    pipe = StableDiffusionPipeline.from_pretrained(_checkpoint(settings), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(settings.device, dtype)


def _drawing(settings: CheckOptions, pipe: Any) -> Callable[[int, int], Any]:
    """What draws pictures with so many steps, so many at once."""
    import torch

    def draw(steps: int, batch: int) -> Any:
        generator = torch.Generator().manual_seed(SEED)
        return pipe(
            PROMPT,
            num_inference_steps=steps,
            num_images_per_prompt=batch,
            guidance_scale=GUIDANCE,
            generator=generator,
            height=settings.sides,
            width=settings.sides,
        )

    return draw
