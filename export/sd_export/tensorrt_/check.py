"""A finished engine against its ONNX reference: is it right, is it whole?

Engines differ from build to build, and a wrong one draws plausible noise: each is run once before anyone relies on it,
at the shapes that it is tuned for and at the ends of its range.  NaN and a solid colour refuse it everywhere; it is
compared with the reference where that is affordable on a CPU, which leaves out a network at its largest shapes.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from sd_runtime.bundle.manifest import EnginePrecision
from sd_runtime.engines.device import DeviceEngine
from sd_runtime.errors import ExportError, OutOfMemoryError
from sd_runtime.tensor import Array, Dim, TensorSpec, all_finite

from ..networks.probes import latent_probes, picture_probes
from .plan import EngineBuild, fixed

if TYPE_CHECKING:
    import tensorrt as trt

End = Literal["opt", "min", "max"]
Run = Callable[[dict[str, Array]], Mapping[str, Array]]

LIMITS: dict[EnginePrecision, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}  # |got - expected| / |expected|
FLAT = 1e-3  # of a picture's magnitude: what varies less is a solid colour
RUNS = 10
WHERE: dict[End, str] = {"opt": "", "min": " at its smallest shapes", "max": " at its largest shapes"}

# How fused attention shows in an engine's layers, and how what is left of one that was taken apart does.
_FUSED = re.compile(r"mha|flash|attention", re.IGNORECASE)
_APART = re.compile(r"softmax|subexp|expsum", re.IGNORECASE)


@dataclass(frozen=True)
class Attention:
    """How many attentions an engine runs fused, and how many in single steps; a builder may hide both."""

    fused: int
    apart: int


@dataclass(frozen=True)
class Findings:
    """What `check` found about an engine that passed: the largest relative difference to the reference, None without
    one, and remarks."""

    error: float | None
    remarks: tuple[str, ...]


def check(planned: EngineBuild, engine: Run, reference: Run | None, scaling_factor: float, *, cheap: bool) -> Findings:
    """Run an engine on all probes at all ends of its range.  `cheap`: the reference can do the largest, too.

    ExportError, and the engine is not to be used: NaN, a solid colour, or further from the reference than LIMITS."""
    worst = None
    remarks = []
    for end in ends(planned):
        for inputs in probes(planned, end, scaling_factor):
            try:
                got = engine(dict(inputs))
            except OutOfMemoryError:
                if end != "max":
                    raise
                remarks.append("not tried at its largest shapes: the GPU's memory is too small for them")
                break
            require_picture(planned, end, got)
            if reference is not None and (cheap or end != "max"):
                worst = max(compare(planned, end, got, reference(dict(inputs))), worst or 0.0)
    return Findings(worst, tuple(remarks))


def ends(planned: EngineBuild) -> tuple[End, ...]:
    """Where in its range an engine is tried: where it is tuned for, and at those ends that are somewhere else."""
    others: tuple[End, ...] = ("min", "max")
    return ("opt", *(end for end in others if shapes(planned, end) != shapes(planned, "opt")))


def shapes(planned: EngineBuild, end: End) -> dict[str, tuple[int, ...]]:
    """The shapes of every input at one end of the engine's range."""
    return {
        spec.name: getattr(planned.profile[spec.name], end) if spec.name in planned.profile else fixed(spec)
        for spec in planned.graph.inputs
    }


def probes(planned: EngineBuild, end: End, scaling_factor: float) -> Iterator[dict[str, Array]]:
    """Inputs as an engine will meet them, the same for every build: an autoencoder's are those on which its values were
    measured at export.  `scaling_factor` is the latent space's."""
    random = np.random.default_rng(0)
    wanted = shapes(planned, end)
    inputs = {spec.name: _values(spec, wanted[spec.name], random) for spec in planned.graph.inputs}
    if planned.component not in ("vae_decoder", "taesd", "vae_encoder"):
        yield inputs
        return
    ((name, (rows, channels, height, width)),) = wanted.items()
    if planned.component == "vae_encoder":
        pictures = picture_probes(1, height, width)
    else:  # a tiny decoder takes latents as the UNet leaves them
        pictures = latent_probes(channels, scaling_factor if planned.component == "vae_decoder" else 1.0, height, width)
    for picture in pictures:
        yield {name: picture.repeat(rows, axis=0)}


def _values(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    if spec.dtype == "float32":
        if spec.name == "timestep":
            return np.full(shape, 501, np.float32)
        return random.standard_normal(shape, np.float32)
    if spec.name == "input_ids":
        return np.resize(np.arange(256), shape).astype(spec.dtype)
    return np.zeros(shape, spec.dtype)  # indices


def require_picture(planned: EngineBuild, end: End, got: Mapping[str, Array]) -> None:
    """ExportError: an output holds NaN or infinity, or nothing but one number or one colour."""
    for name, array in got.items():
        if not all_finite(array):
            what = f"the engine {planned.label} gives NaN or infinity in '{name}'{WHERE[end]}"
            raise ExportError(what, remedy=_remedy(planned))
        if is_flat(array):
            what = f"the engine {planned.label} gives the same number everywhere in '{name}'{WHERE[end]}"
            raise ExportError(what, remedy=_remedy(planned))


def is_flat(array: Array) -> bool:
    """Whether values do not vary: of pictures and latents (…, channels, height, width), or uint8 (…, height, width, 3),
    whether those of any picture do not within its channels, so that a red one is flat, too.  A number for each row,
    such as the next timestep, is no picture."""
    if array.ndim < 2:
        return False
    values = array.astype(np.float32)
    if array.dtype == np.uint8 and array.ndim > 3:
        values = np.moveaxis(values, -1, -3)
    if values.ndim < 4:
        values = values.reshape(1, 1, -1)
    else:
        values = values.reshape(-1, values.shape[-3], values.shape[-2] * values.shape[-1])
    if values.shape[-1] < 2:
        return False
    magnitude = np.sqrt(np.mean(values**2, axis=(1, 2)))
    return bool((values.std(axis=2).max(axis=1) <= FLAT * magnitude).any())


def compare(planned: EngineBuild, end: End, got: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The largest relative difference of an output to the reference's; ExportError if it is beyond LIMITS."""
    worst = 0.0
    for name, array in got.items():
        reference = expected[name].astype(np.float64)
        scale = float(np.sqrt(np.mean(reference**2))) or 1.0
        error = float(np.sqrt(np.mean((array - reference) ** 2))) / scale
        if not error <= LIMITS[planned.precision]:
            what = f"the engine {planned.label} differs from its ONNX graph in '{name}'{WHERE[end]}"
            accepted = f"up to {LIMITS[planned.precision]:.0e}"
            raise ExportError(what, got=f"{error:.1e}", accepted=accepted, remedy=_remedy(planned))
        worst = max(error, worst)
    return worst


def _remedy(planned: EngineBuild) -> str:
    return f"build again; if it persists, use another --precision than {planned.precision}"


def row_by_row(run: Run, planned: EngineBuild) -> Run:
    """`run`, given one row of the batch after the other: the scores of a whole batch's attentions would fill gigabytes
    of main memory."""
    batched = {
        spec.name
        for spec in planned.graph.inputs
        if isinstance(axis := spec.shape[0], Dim) and axis.symbol in ("batch", "timesteps")
    }

    def run_rows(inputs: dict[str, Array]) -> dict[str, Array]:
        (rows,) = {len(inputs[name]) for name in batched}
        parts = [
            run({name: array[row : row + 1] if name in batched else array for name, array in inputs.items()})
            for row in range(rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return run_rows


def milliseconds(engine: DeviceEngine, inputs: Mapping[str, Array]) -> float:
    """The median time of a run on the GPU, as the device loop runs it: recorded once and replayed."""
    outputs = engine.run(dict(inputs))
    tensors = {name: engine.tensor(name, array.shape) for name, array in {**inputs, **outputs}.items()}
    first_output = next(iter(outputs))
    try:
        for name, array in inputs.items():
            tensors[name].write(array)
        launch = engine.prepare(tensors)
        recorded = engine.device.record([launch])
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            recorded()
            tensors[first_output].read(1).wait()
            times.append(time.perf_counter() - start)
        recorded.close()
        launch.close()
    finally:
        for tensor in tensors.values():
            tensor.close()
    return statistics.median(times) * 1e3


def attention(engine: trt.ICudaEngine) -> Attention:
    """What the engine inspector shows of attention; where it shows nothing that can be read, none."""
    import tensorrt as trt

    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        shown = json.loads(text)
    except ValueError:  # some versions write names that JSON does not allow
        return Attention(0, 0)
    layers = shown.get("Layers") if isinstance(shown, dict) else None
    fused = apart = 0
    for layer in layers if isinstance(layers, list) else []:
        if not isinstance(layer, dict):
            continue
        kernel = f"{layer.get('LayerType', '')} {layer.get('TacticName', '')}"
        name = str(layer.get("Name", ""))
        kernel += f" {name}" if name.startswith("_") else ""  # named by the compiler, not after the graph
        if _FUSED.search(kernel):
            fused += 1
        elif _APART.search(f"{kernel} {name.rpartition('/')[2]}"):
            apart += 1
    return Attention(fused, apart)


def unfused(planned: EngineBuild, expected: int, seen: Attention) -> str | None:
    """A remark if an engine shows fewer fused attentions than the `expected` ones that its graph has.

    Fused kernels are for half precision, and end below the 512 channels of an autoencoder's one head."""
    if planned.precision == "fp32" or planned.component in ("vae_decoder", "vae_encoder", "taesd"):
        return None
    if seen.apart:
        return f"{seen.apart} attentions are not fused: another version of TensorRT may be faster"
    if seen.fused < expected:
        shown = f"{seen.fused or 'no'} fused attentions, where the graph has {expected}"
        return f"the engine's layers show {shown}: another version of TensorRT may be faster"
    return None
