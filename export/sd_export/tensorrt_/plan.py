"""Which engines to build: from what a user asks for to a list of graphs, each with the shapes that it is built for.

An engine for exact shapes is the fastest; next to the ones asked for there is one dynamic fallback for a small range
around them, so that every other picture of moderate size finds an engine, too.  Ranges are small because the builder's
memory, and the engine's, grow with the largest shape that a profile allows.  Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sd_runtime.errors import BundleError, UsageError

if TYPE_CHECKING:
    from sd_runtime.bundle.manifest import EngineLibrary, EnginePrecision, Graph, Manifest, ShapeRange
    from sd_runtime.tensor import TensorSpec

    Range = tuple[int, int, int]  # smallest, tuned for, largest

ENGINE_PRECISIONS: Final = ("fp32", "fp16", "bf16")
LIBRARIES: Final = ("tensorrt", "tensorrt_rtx")
STEP = 64  # pixels; Stable Diffusion's UNet halves its latents three times
BFLOAT16: Final = (10, 15)  # has a layer for GroupNormalization as of opset 21; older opsets know no bfloat16
STRONGLY_TYPED: Final = (10, 0)  # takes precision from the graph; version 11 knows nothing else
OTHER_FORM: Final = {"trt-basic": "trt-legacy"}  # every version parses its older operators
OLDEST: Final = (8, 5)
NEWEST: Final = (11, 0)

DRAWS = (1, 1, 8)  # rows of noise that the device loop keeps ready
PROMPTS = (1, 2, 8)  # prompts in one call of the text encoder
FALLBACK_PIXELS = (256, 768)  # the sides that the dynamic fallback takes, unless larger ones are asked for
FALLBACK_CHUNKS = 3  # of 77 tokens


@dataclass(frozen=True)
class BuildOptions:
    """Build engines for the bundle in the folder `bundle`.

    sizes       (width, height) in pixels; none means the size that the model recommends
    batches     pictures at once
    precision   None is the bundle's own; bf16 needs a float32 bundle and TensorRT 10.15
    refittable  the weights of matrix products and convolutions can be exchanged later; not with TensorRT for RTX,
                and with TensorRT from 10.2 on
    fallback    also build a dynamic engine for shapes near those asked for; None: with TensorRT, not with TensorRT for
                RTX, whose engines take any number of pictures up to the largest batch as they are
    workspace   GB of GPU memory that a layer may use as scratch space; None leaves it to the library
    library     "tensorrt": engines for the GPU of this machine; "tensorrt_rtx": for all GPUs that TensorRT for RTX
                knows, built on any machine
    turing      with TensorRT for RTX: also build engines for GPUs of compute capability 7.5, which need their own
    """

    bundle: Path
    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    precision: EnginePrecision | None = None
    refittable: bool = False
    fallback: bool | None = None
    workspace: float | None = None
    library: EngineLibrary = "tensorrt"
    turing: bool = False

    def __post_init__(self) -> None:
        for width, height in self.sizes:
            if min(width, height) < STEP or max(width, height) > 1024 or width % STEP or height % STEP:
                accepted = f"WIDTHxHEIGHT, multiples of {STEP} from {STEP} to 1024"
                raise UsageError("size", got=f"{width}x{height}", accepted=accepted)
        if not self.batches or not all(1 <= batch <= 16 for batch in self.batches):
            raise UsageError("batch", got=self.batches, accepted="1 to 16 pictures")
        if self.workspace is not None and not 0 < self.workspace <= 1000:
            raise UsageError("workspace", got=self.workspace, accepted="GB, more than 0")
        if self.precision not in (None, *ENGINE_PRECISIONS):
            raise UsageError("precision", got=self.precision, accepted=", ".join(ENGINE_PRECISIONS))
        self._check_library()

    def _check_library(self) -> None:
        """UsageError: what one of the libraries cannot do."""
        if self.library not in LIBRARIES:
            raise UsageError("library", got=self.library, accepted=", ".join(LIBRARIES))
        if self.turing and self.library != "tensorrt_rtx":
            raise UsageError("turing", got="with TensorRT", accepted="with TensorRT for RTX: --for rtx")
        if self.refittable and self.library == "tensorrt_rtx":
            remedy = "leave it out, or build with TensorRT on the machine that draws"
            raise UsageError("refittable", got="TensorRT for RTX, which needs a GPU for it", remedy=remedy)


@dataclass(frozen=True)
class EngineBuild:
    """An engine to build: a graph of a component, and for every input that varies the shapes it is built for."""

    component: str
    form: str
    graph: Graph
    precision: EnginePrecision
    profile: dict[str, ShapeRange]
    label: str  # "unet 512x512 batch 1": for people, and in the engine's file name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the engine is tuned for, of every input."""
        return {
            spec.name: self.profile[spec.name].opt if spec.name in self.profile else fixed(spec)
            for spec in self.graph.inputs
        }


def plan_builds(manifest: Manifest, options: BuildOptions, tensorrt: str) -> tuple[EngineBuild, ...]:
    """All engines that `options` ask for, the large ones first; `tensorrt` is the version of their library.

    UsageError, BundleError: the bundle has no such graphs."""
    form, precision = form_for(manifest, options, tensorrt)
    sizes = options.sizes or ((manifest.defaults.width, manifest.defaults.height),)
    planner = _Planner(manifest, form, precision)
    wanted = [(width, height, batch) for width, height in sizes for batch in options.batches]
    portable = options.library == "tensorrt_rtx"
    exact = ("vae_decoder", "taesd", "vae_encoder") if portable else ("unet", "vae_decoder", "taesd")
    builds = [*planner.any_rows(sizes, wanted)] if portable else []
    builds += [planned for component in exact for planned in planner.exact(component, wanted)]
    if not portable if options.fallback is None else options.fallback:
        components = ("unet", "vae_decoder", "taesd", "vae_encoder")
        builds += [planned for component in components for planned in planner.dynamic(component, wanted)]
    return (*builds, *planner.rest(wanted))


def form_for(manifest: Manifest, options: BuildOptions, tensorrt: str) -> tuple[str, EnginePrecision]:
    """The graphs' form that a version of a library parses, and the precision; UsageError if it cannot be had."""
    version = tuple(int(part) for part in tensorrt.split(".")[:2])
    if options.library == "tensorrt_rtx":
        version = NEWEST  # it counts its own, and parses what the newest TensorRT does
    precision = options.precision or manifest.precision
    if options.turing:
        require_half(precision, manifest.source.id)
    if version < OLDEST:
        raise UsageError("TensorRT", got=tensorrt, accepted="8.5 or newer")
    if precision == "bf16":
        if manifest.precision != "fp32" or version < BFLOAT16:
            got = f"a {manifest.precision} bundle and TensorRT {tensorrt}"
            raise UsageError("precision bf16", got=got, accepted="a fp32 bundle and TensorRT 10.15 or newer")
        return "trt-bf16", precision
    if precision != manifest.precision:
        remedy = f"sd-export --model {manifest.source.id} --precision {precision} --force"
        raise UsageError("precision", got=precision, accepted=f"{manifest.precision}, the bundle's", remedy=remedy)
    if version < STRONGLY_TYPED:
        return "trt-legacy", precision
    return "trt-basic", precision


def in_other_form(manifest: Manifest, planned: EngineBuild) -> EngineBuild | None:
    """The same engine from another graph that the library parses, too; None where there is none."""
    graphs = manifest.components[planned.component].graphs
    form = OTHER_FORM.get(planned.form, "")
    return replace(planned, form=form, graph=graphs[form]) if form in graphs else None


def require_half(precision: EnginePrecision, model: str) -> None:
    """UsageError unless Turing's tensor cores know the precision: TensorRT for RTX has no other products for them."""
    if precision != "fp16":
        remedy = f"build without --turing, or export for it: sd-export --model {model} --precision fp16"
        raise UsageError("turing", got=f"precision {precision}", accepted="fp16", remedy=remedy)


def _at_once(component: str, wanted: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The sizes with as many pictures as a network is given in one call: an autoencoder gets them one by one."""
    if component == "unet":
        return wanted
    return list(dict.fromkeys((width, height, 1) for width, height, _ in wanted))


class _Planner:
    """Plans the engines of a bundle's networks in one form."""

    def __init__(self, manifest: Manifest, form: str, precision: EnginePrecision) -> None:
        self._manifest, self._form, self._precision = manifest, form, precision
        self._pixels = manifest.latent.pixels
        self._positions = tokens_in_a_chunk(manifest)

    def exact(self, component: str, wanted: list[tuple[int, int, int]]) -> Iterator[EngineBuild]:
        """An engine for each size (width, height, batch)."""
        rows, _ = self._rows(component)
        for width, height, batch in _at_once(component, wanted):
            axes = self._picture((rows * batch,) * 3, (width,) * 3, (height,) * 3)
            axes["sequence_length"] = (self._positions,) * 3
            yield from self._engine(component, axes, f"{width}x{height} batch {batch}")

    def any_rows(self, sizes: Sequence[tuple[int, int]], wanted: list[tuple[int, int, int]]) -> Iterator[EngineBuild]:
        """One engine of the UNet for each size (width, height), for any number of rows up to the most that the largest
        batch can have: with TensorRT for RTX that costs no speed."""
        rows, widest = self._rows("unet")
        tuned, most = rows * wanted[0][2], widest * max(size[2] for size in wanted)
        for width, height in sizes:
            axes = self._picture((1, tuned, most), (width,) * 3, (height,) * 3)
            axes["sequence_length"] = (self._positions,) * 3
            yield from self._engine("unet", axes, f"{width}x{height}")

    def dynamic(self, component: str, wanted: list[tuple[int, int, int]]) -> Iterator[EngineBuild]:
        """One engine for a range around the sizes, any number of rows up to the most that they can have: guidance may
        be asked for where the model is meant to be used without, too."""
        wanted = _at_once(component, wanted)
        width, height, batch = wanted[0]
        low, high = FALLBACK_PIXELS
        sides = [side for size in wanted for side in size[:2]]
        low, high = min(low, *sides), max(high, *sides)
        rows, widest = self._rows(component)
        most = widest * max(size[2] for size in wanted)
        axes = self._picture((1, rows * batch, most), (low, width, high), (low, height, high))
        axes["sequence_length"] = (self._positions, self._positions, FALLBACK_CHUNKS * self._positions)
        yield from self._engine(component, axes, "dynamic")

    def rest(self, wanted: list[tuple[int, int, int]]) -> Iterator[EngineBuild]:
        """What does not depend on the picture's size: the text encoder and the safety checker; and the graphs without
        weights, for everything that the others take."""
        yield from self._engine("text_encoder", {"batch": PROMPTS}, "dynamic")
        yield from self._engine("safety_checker", {"batch": (1, 1, 1)}, "one picture")
        low, high = STEP, max(FALLBACK_PIXELS[1], *(side for size in wanted for side in size[:2]))
        width, height, batch = wanted[0]
        most = max(size[2] for size in wanted)
        axes = self._picture((1, batch, most), (low, width, high), (low, height, high))
        axes |= {"rows": (2, 2 * batch, 2 * most), "draws": DRAWS}
        yield from self._engine("sampler_step", axes, "guided", "guided")
        # Without guidance as many pictures at once as the UNet has rows
        yield from self._engine("sampler_step", axes | {"batch": (1, batch, 2 * most)}, "plain", "plain")
        yield from self._engine("pixels", axes, "plain", "plain")

    def _rows(self, component: str) -> tuple[int, int]:
        """Of a network's batch for each picture: where it is used as its authors recommend, and at most."""
        if component != "unet":
            return 1, 1
        from sd_runtime.engines.tensorrt_.rebuild import rows_a_picture, takes_guidance

        return rows_a_picture(self._manifest), 1 if takes_guidance(self._manifest) else 2

    def _picture(self, rows: Range, width: Range, height: Range) -> dict[str, Range]:
        """The axes of pictures and latents, by the symbols of the graphs' tensors."""

        def cells(pixels: Range) -> Range:
            low, tuned, high = (side // self._pixels for side in pixels)
            return low, tuned, high

        latent = {"latent_width": cells(width), "latent_height": cells(height)}
        return {"batch": rows, "timesteps": rows, "width": width, "height": height, **latent}

    def _engine(
        self, component: str, axes: Mapping[str, Range], shape: str, form: str | None = None
    ) -> Iterator[EngineBuild]:
        """The engine to build, if the bundle has the component."""
        known = self._manifest.components.get(component)
        if known is None:
            return
        form = form or self._form
        if form not in known.graphs:
            remedy = f"export it again: sd-export --model {self._manifest.source.id} --force"
            raise BundleError(f"the bundle has no {form} graph of {component}", remedy=remedy)
        graph = known.graphs[form]
        profile = {spec.name: ranged(spec, axes) for spec in graph.inputs if fixed(spec) != spec.shape}
        precision: EnginePrecision = "fp32" if known.weights is None else self._precision
        yield EngineBuild(component, form, graph, precision, profile, f"{component} {shape}")


def ranged(spec: TensorSpec, axes: Mapping[str, Range]) -> ShapeRange:
    """The shapes of one input; axes that are not named keep the range that the graph declares."""
    from sd_runtime.bundle.manifest import ShapeRange

    sizes = [
        (axis,) * 3 if isinstance(axis, int) else axes.get(axis.symbol, (axis.min, axis.opt, axis.max))
        for axis in spec.shape
    ]
    low, tuned, high = zip(*sizes, strict=True)
    return ShapeRange(low, tuned, high)


def fixed(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of an input without the axes that vary: its own shape if none does."""
    return tuple(axis for axis in spec.shape if isinstance(axis, int))


def tokens_in_a_chunk(manifest: Manifest) -> int:
    """77: the length of the text encoder's input."""
    encoder = manifest.components.get("text_encoder")
    return fixed(encoder.graph().inputs[0])[0] if encoder is not None else 77


def parse_size(text: str) -> tuple[int, int]:
    """ "512x768" → (width, height)."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise UsageError("size", got=text, accepted="WIDTHxHEIGHT, such as 512x768")
    return int(width), int(height)


def parse_batches(text: str) -> tuple[int, ...]:
    """ "1,2,4" → (1, 2, 4)."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError("batch", got=text, accepted="numbers such as 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))
