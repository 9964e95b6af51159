"""The sampler step as a small ONNX graph, so that denoising never leaves the GPU.

A sampling plan is a table: after evaluation k of the UNet, state ← coefficients[k] @ [state, model output, noise].  The
graph takes each picture's row k of that table from the GPU's memory, applies it, prepares the UNet's next input, and
counts k itself, so that UNet and step can be captured as one CUDA graph and replayed E times with nothing to change in
between.

    state          (B, S, C, h, w) float32   what the sampler remembers; state[:, 0] is the UNet's next input
    model_output   (R, C, h, w)    float32   the UNet's: R = 2 B rows, the negative prompts' first, or R = B unguided
    noise          (B, C, h, w)    float32   fresh noise, where the plan takes any; else its coefficients are 0
    coefficients   (E, S, S + 2)   float32   the plan's table, or those of several plans one after the other
    timesteps      (E + 1,)        float32   the same rows, and one more (any) for the step after the last
    guidance_scale (B,)            float32   in the guided form only
    index          (B,)            int32     each picture's row k of the table
    →
    next_state     (B, S, C, h, w) float32   after the last evaluation, next_state[:, 0] is the final latent
    next_sample    (R, C, h, w)    float32   the UNet's next input: next_state[:, 0], twice when guided
    next_timestep  (R,)            float32   timesteps[k + 1] of each row's picture
    next_index     (B,)            int32     k + 1

A picture is a slot: its state, its place in the table and its guidance scale are its own, so that pictures of different
requests, samplers and steps share an evaluation.

All of it lives in opset 17 with 32-bit integers, which TensorRT 8.5 parses as well as TensorRT 11; nothing has a shape
of rank 0.  Build it without TF32: its one matrix product carries the latents.

The pixels graph is the other end of the loop: the decoder's samples to the bytes of a picture, so that the host need
not convert them.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx.parser
from sd_runtime.tensor import Dim, TensorSpec

from ..signature import MAX_IMAGES, Signature, Sizes

MAX_STATE = 8  # tensors a sampler remembers, the current sample included; the most of ours is 6
MAX_EVALUATIONS = 2048  # 1000 steps of a sampler that evaluates the UNet twice a step

# How the UNet's rows become one prediction a picture, and one sample a picture becomes the UNet's rows.
# Classifier-free guidance: Ho & Salimans 2022, arXiv 2207.12598, equation 6 with guidance_scale = 1 + w.
_GUIDED = (
    """
    halves = Reshape(model_output, two_rows)                 # (2, B·C·h·w)
    first, second = Split<axis = 0>(halves)
    one_each = Shape(noise)
    negative = Reshape(first, one_each)                      # (B, C, h, w)
    positive = Reshape(second, one_each)
    difference = Sub(positive, negative)
    scale = Unsqueeze(guidance_scale, inner)                 # (B, 1, 1, 1)
    scaled = Mul(difference, scale)
    prediction = Add(negative, scaled)                       # (B, C, h, w)
    """,
    """
    next_sample = Concat<axis = 0>(latents, latents)         # (2 B, C, h, w)
    next_timestep = Concat<axis = 0>(timestep, timestep)     # (2 B,)
    """,
)
_PLAIN = (
    "prediction = Identity(model_output)                         # (B, C, h, w)",
    """
    next_sample = Identity(latents)                          # (B, C, h, w)
    next_timestep = Identity(timestep)                       # (B,)
    """,
)

_STEP = """
<ir_version: 8, opset_import: ["": 17]>
{form} (
    float[B, S, {channels}, h, w] state, float[{rows}, {channels}, h, w] model_output,
    float[B, {channels}, h, w] noise, float[E, S, T] coefficients, float[F] timesteps, {guidance} int32[B] index
) => (
    float[B, S, {channels}, h, w] next_state, float[{rows}, {channels}, h, w] next_sample,
    float[{rows}] next_timestep, int32[B] next_index
)
<int64[2] two_rows = {{2, -1}}, int64[3] flat = {{0, 0, -1}}, int64[3] inner = {{1, 2, 3}},
 int64[1] zeroth = {{0}}, int64[1] second_axis = {{1}}, int32[1] one = {{1}}>
{{
    {combine}
    predicted = Unsqueeze(prediction, second_axis)           # (B, 1, C, h, w)
    fresh = Unsqueeze(noise, second_axis)                    # (B, 1, C, h, w)
    sources = Concat<axis = 1>(state, predicted, fresh)      # (B, S + 2, C, h, w)
    terms = Reshape(sources, flat)                           # (B, S + 2, C·h·w)
    row = Gather<axis = 0>(coefficients, index)              # (B, S, S + 2)
    advanced = MatMul(row, terms)                            # (B, S, C·h·w)
    shape = Shape(state)
    next_state = Reshape(advanced, shape)                    # (B, S, C, h, w)
    newest = Gather<axis = 1>(next_state, zeroth)            # (B, 1, C, h, w)
    latents = Squeeze(newest, second_axis)                   # (B, C, h, w)
    next_index = Add(index, one)
    timestep = Gather<axis = 0>(timesteps, next_index)       # (B,)
    {spread}
}}
"""

# diffusers' VaeImageProcessor: x / 2 + 0.5, clipped to [0, 1], times 255, rounded with halves to even.
_PIXELS = """
<ir_version: 8, opset_import: ["": 17]>
pixels (float[B, 3, H, W] sample) => (uint8[B, H, W, 3] pixels)
<float half = {0.5}, float zero = {0}, float one = {1}, float white = {255}>
{
    halved = Mul(sample, half)
    shifted = Add(halved, half)
    clipped = Clip(shifted, zero, one)
    scaled = Mul(clipped, white)
    rounded = Round(scaled)
    channels_last = Transpose<perm = [0, 2, 3, 1]>(rounded)
    pixels = Cast<to = 2>(channels_last)
}
"""


def step_graph(sizes: Sizes, *, guided: bool) -> onnx.ModelProto:
    """The sampler step for a checkpoint's latents; see the top of this module."""
    combine, spread = _GUIDED if guided else _PLAIN
    text = _STEP.format(
        form="guided" if guided else "plain",
        channels=sizes.channels,
        rows="R" if guided else "B",
        guidance="float[B] guidance_scale," if guided else "",
        combine=combine,
        spread=spread,
    )
    return _parse(text)


def pixels_graph() -> onnx.ModelProto:
    """The decoder's samples, (B, 3, H, W) float32, to (B, H, W, 3) uint8."""
    return _parse(_PIXELS)


def step_signature(sizes: Sizes, *, guided: bool) -> Signature:
    """The tensors of `step_graph`."""
    batch, height, width = Dim("batch", 1, 1, MAX_IMAGES), *sizes.latent_axes()
    image = (sizes.channels, height, width)
    state = Dim("state", 1, 2, MAX_STATE)
    evaluations = Dim("evaluations", 1, 50, MAX_EVALUATIONS)
    rows = Dim("rows", 2, 2, 2 * MAX_IMAGES) if guided else batch
    terms = Dim("state + 2", state.min + 2, state.opt + 2, state.max + 2)
    timesteps = Dim("evaluations + 1", evaluations.min + 1, evaluations.opt + 1, evaluations.max + 1)
    inputs = {
        "state": ("float32", (batch, state, *image)),
        "model_output": ("float32", (rows, *image)),
        "noise": ("float32", (batch, *image)),
        "coefficients": ("float32", (evaluations, state, terms)),
        "timesteps": ("float32", (timesteps,)),
        "guidance_scale": ("float32", (batch,)),
        "index": ("int32", (batch,)),
    }
    if not guided:
        del inputs["guidance_scale"]
    outputs = {
        "next_state": ("float32", (batch, state, *image)),
        "next_sample": ("float32", (rows, *image)),
        "next_timestep": ("float32", (rows,)),
        "next_index": ("int32", (batch,)),
    }
    return Signature(_specs(inputs), _specs(outputs))


def pixels_signature(sizes: Sizes) -> Signature:
    """The tensors of `pixels_graph`."""
    batch, height, width = Dim("batch", 1, 1, MAX_IMAGES), *sizes.rgb_axes(("height", "width"))
    return Signature(
        inputs=(TensorSpec("sample", "float32", (batch, 3, height, width)),),
        outputs=(TensorSpec("pixels", "uint8", (batch, height, width, 3)),),
    )


def _specs(tensors: Mapping[str, tuple[str, tuple[int | Dim, ...]]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items())


def _parse(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model
