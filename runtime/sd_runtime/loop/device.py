"""The denoising loop on the device: what `denoise` does on the host, with nothing in it that waits for the host.

Latents, the sampler's state, the plan's table and the prompts' embeddings lie in the device's memory.  An evaluation is
the UNet and then the sampler step, a small graph that applies row k of the table, guidance included, writes the UNet's
next input, and counts k itself.  So every evaluation is the same work on the same memory, recorded once for a shape
(as a CUDA graph where there is CUDA) and replayed as often as the plan has rows:

    ┌─▶ UNet: sample, timestep, encoder_hidden_states ─▶ output
    └── step: output, state, index, tables ─▶ sample, timestep, and the other state and index

The host queues the next evaluation, with the noise that it needs, before it looks at the latents of the last one.

The state and the index are kept twice, since a graph must not write what it reads: even evaluations go from the first
to the second, odd ones back, and there are two recordings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from ..engines.device import DeviceEngine, DeviceTensor, Launch, Pending
from ..engines.pool import Pool
from ..errors import EXPORT_IN_FP32, NumericalError
from ..noise import NoiseSource
from ..sampling import SamplingPlan
from ..tensor import Array, all_finite
from .guidance import Guidance
from .host import Evaluated

IDLE_LOOPS = 4  # shapes whose memory and recordings are kept for the next request
SHORTEST_TABLE = 64  # evaluations that the tables have room for, at least; beyond, powers of two


@dataclass(frozen=True)
class LoopShape:
    """What the memory and the recordings of a loop depend on.

    images        B pictures
    rows          R rows of the UNet's batch: 2 B with guidance, B without
    latent        (C, h, w)
    text          (T, D) of encoder_hidden_states
    guidance      width of the embedding that tells the UNet the guidance scale; None: it is not told
    state         S tensors that the sampler remembers
    evaluations   E, for which the tables have room
    """

    images: int
    rows: int
    latent: tuple[int, ...]
    text: tuple[int, ...]
    guidance: int | None
    state: int
    evaluations: int

    @property
    def form(self) -> str:
        """The form of the sampler step's graph: guided, or plain."""
        return "plain" if self.rows == self.images else "guided"


class DeviceDenoiser:
    """`denoise` for a UNet and a sampler step on one device; callable with the same arguments but the UNet.

    Guidance is linear here: `guidance.rescale` must be 0.
    """

    def __init__(self, unet: DeviceEngine, steps: Mapping[str, DeviceEngine]) -> None:
        """`steps`: the sampler step's engines by form, "guided" and "plain"."""

        def build(shape: LoopShape) -> DeviceLoop:
            return DeviceLoop(unet, steps[shape.form], shape)

        self._loops = Pool(build, IDLE_LOOPS)

    def __call__(
        self,
        plan: SamplingPlan,
        latents: Array,
        encoder_hidden_states: Array,
        guidance: Guidance,
        noise: NoiseSource,
    ) -> Generator[Evaluated]:
        """Run every evaluation of `plan`, yielding after each.  When iteration stops, at most one more is run.

        latents: (B, C, h, w) float32, the UNet's first input; encoder_hidden_states: (R, T, D) float32.
        """
        assert not guidance.rescale
        shape = LoopShape(
            images=len(latents),
            rows=len(encoder_hidden_states),
            latent=latents.shape[1:],
            text=encoder_hidden_states.shape[1:],
            guidance=guidance.width,
            state=plan.coefficients.shape[1],
            evaluations=max(SHORTEST_TABLE, 1 << (len(plan) - 1).bit_length()),
        )
        with self._loops.borrowed(shape) as loop:
            yield from loop.run(plan, latents, encoder_hidden_states, guidance, noise)

    def close(self) -> None:
        self._loops.close()


class DeviceLoop:
    """The tensors and recordings for one shape.  One request at a time."""

    def __init__(self, unet: DeviceEngine, step: DeviceEngine, shape: LoopShape) -> None:
        with ExitStack() as stack:

            def tensor(engine: DeviceEngine, name: str, *size: int) -> DeviceTensor:
                made = engine.tensor(name, size)
                stack.callback(made.close)
                return made

            def closing(launch: Launch) -> Launch:
                stack.callback(launch.close)
                return launch

            images, rows, table = (shape.images, *shape.latent), (shape.rows, *shape.latent), shape.evaluations
            self._network = {
                "sample": tensor(unet, "sample", *rows),
                "timestep": tensor(unet, "timestep", shape.rows),
                "encoder_hidden_states": tensor(unet, "encoder_hidden_states", shape.rows, *shape.text),
                "out_sample": tensor(unet, "out_sample", *rows),
            }
            if shape.guidance is not None:
                self._network["timestep_cond"] = tensor(unet, "timestep_cond", shape.rows, shape.guidance)
            self._tables = {
                "noise": tensor(step, "noise", *images),
                "coefficients": tensor(step, "coefficients", table, shape.state, shape.state + 2),
                "timesteps": tensor(step, "timesteps", table + 1),
            }
            if shape.form == "guided":
                self._tables["guidance_scale"] = tensor(step, "guidance_scale", shape.images)
            self._states = [tensor(step, "state", shape.images, shape.state, *shape.latent) for _ in range(2)]
            self._indices = [tensor(step, "index", shape.images) for _ in range(2)]
            network = closing(unet.prepare(self._network))
            steps = [closing(step.prepare(self._step_tensors(parity))) for parity in range(2)]
            self._evaluations = [closing(unet.device.record([network, advance])) for advance in steps]
            self._resources = stack.pop_all()

    def _step_tensors(self, parity: int) -> dict[str, DeviceTensor]:
        """The sampler step's inputs and outputs for even (0) or odd (1) evaluations."""
        return {
            **self._tables,
            "state": self._states[parity],
            "index": self._indices[parity],
            "model_output": self._network["out_sample"],
            "next_state": self._states[1 - parity],
            "next_index": self._indices[1 - parity],
            "next_sample": self._network["sample"],
            "next_timestep": self._network["timestep"],
        }

    def run(
        self,
        plan: SamplingPlan,
        latents: Array,
        encoder_hidden_states: Array,
        guidance: Guidance,
        noise: NoiseSource,
    ) -> Generator[Evaluated]:
        """Queue evaluation after evaluation; the device always has the next one when it finishes one."""
        self._start(plan, latents, encoder_hidden_states, guidance)
        under_way: deque[Pending] = deque()
        for index in range(len(plan)):
            drawn = noise.draw(latents.shape[1:]) if plan.draws[index] else None
            under_way.append(self._queue(index, drawn, len(latents)))
            if index:
                yield finished(plan, index - 1, under_way.popleft())
        yield finished(plan, len(plan) - 1, under_way.popleft())

    def _start(self, plan: SamplingPlan, latents: Array, encoder_hidden_states: Array, guidance: Guidance) -> None:
        """Upload what the whole run needs."""
        sample, timesteps = self._network["sample"], plan.timesteps.astype(np.float32)
        sample.write(np.concatenate([latents] * (sample.shape[0] // len(latents))))
        self._network["timestep"].write(np.full(sample.shape[0], timesteps[0]))
        self._network["encoder_hidden_states"].write(encoder_hidden_states)
        for name, embedded in guidance.inputs(len(encoder_hidden_states)).items():
            self._network[name].write(embedded)
        state = plan.initial_state(latents).reshape(-1, *latents.shape)  # (S, B, C, h, w)
        self._states[0].write(np.ascontiguousarray(state.swapaxes(0, 1)))
        self._indices[0].write(np.zeros(len(latents), np.int32))
        for name, values in (("coefficients", plan.table(plan.coefficients.shape[1])), ("timesteps", timesteps)):
            self._tables[name].write(padded_rows(values, self._tables[name].shape[0]))
        if "guidance_scale" in self._tables:
            self._tables["guidance_scale"].write(np.full(len(latents), guidance.scale, np.float32))

    def _queue(self, index: int, drawn: Array | None, images: int) -> Pending:
        """Queue an evaluation, its noise before it, and a copy of the latents (B, C, h, w) after it."""
        if drawn is not None:
            self._tables["noise"].write(drawn)
        self._evaluations[index % 2]()
        return self._network["sample"].read(images)

    def close(self) -> None:
        self._resources.close()


def finished(plan: SamplingPlan, index: int, pending: Pending) -> Evaluated:
    """Wait for an evaluation.  NumericalError: it left NaN or infinity."""
    latents = pending.wait().copy()
    if not all_finite(latents):
        raise NumericalError(
            f"latents after step {index + 1} of {len(plan)} (timestep {plan.timesteps[index]:g})",
            got="NaN or infinity",
            remedy=f"lower `guidance_scale`, or {EXPORT_IN_FP32}",
        )
    return Evaluated(index, len(plan), float(plan.timesteps[index]), latents)


def padded_rows(values: Array, length: int) -> Array:
    """`values` with zeros after them, `length` rows in all."""
    out = np.zeros((length, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    return out
