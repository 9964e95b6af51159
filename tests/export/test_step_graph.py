"""The sampler step graph, run by ONNX Runtime evaluation after evaluation, against the plan's own numpy arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from sd_export.graphs.step_graph import pixels_graph, pixels_signature, step_graph, step_signature
from sd_export.signature import Signature, Sizes
from sd_runtime.images.convert import to_pixels
from sd_runtime.sampling import SamplingPlan, SchedulerConfig, describe, make_plan, resolve
from sd_runtime.tensor import Array, check_feeds

SIZES = Sizes(channels=4, pixels=8, cells=16, positions=77, width=32)
STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SAMPLERS = [name.removesuffix("[_karras|_exponential]") for name, _ in describe()]
SAMPLERS += ["dpmpp_2m_karras", "dpmpp_2m_sde_exponential", "dpm2_a_karras"]
SHAPE = (2, 4, 8, 9)  # two pictures
STATES = 6  # the most that a sampler keeps


def plan_of(sampler: str, steps: int, strength: float = 1.0) -> SamplingPlan:
    config = SchedulerConfig.from_dict(STABLE_DIFFUSION)
    return make_plan(config.switched(resolve(sampler)), steps, strength=strength)


def session(guided: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    graph = step_graph(SIZES, guided=guided).SerializeToString()
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions() -> dict[bool, Any]:
    return {guided: session(guided) for guided in (False, True)}


def network(sample: Array, timesteps: Array, *, guided: bool) -> Array:
    """Any function that depends on every value, the timestep and the half: the negative prompts' or the prompts'."""
    slopes = np.repeat(np.float32([0.8, 1.2]), len(sample) // 2) if guided else np.ones(len(sample), np.float32)
    moments = np.broadcast_to(timesteps, len(sample)) / np.float32(500)
    turned = np.sin(sample * slopes.reshape(-1, 1, 1, 1) + moments.reshape(-1, 1, 1, 1))
    made: Array = np.float32(0.3) * turned + np.float32(0.1) * sample
    return made


def tables(plan: SamplingPlan) -> dict[str, Array]:
    """What a runtime uploads once a request: the plan."""
    return {
        "coefficients": plan.coefficients.astype(np.float32),
        "timesteps": np.append(plan.timesteps, 0).astype(np.float32),
    }


def on_graph(runner: Any, plan: SamplingPlan, latents: Array, draws: Array, guidance: float | None) -> Array:
    """The device loop: the graph's outputs are its next inputs; nothing else changes but the noise."""
    signature, pictures = step_signature(SIZES, guided=guidance is not None), len(latents)
    fixed, drawn, noise = tables(plan), iter(draws), np.zeros(SHAPE, np.float32)
    if guidance is not None:
        fixed["guidance_scale"] = np.full(pictures, guidance, np.float32)
    state = first_state(plan, latents)
    sample = np.concatenate([latents, latents]) if guidance is not None else latents
    timestep, index = np.repeat(fixed["timesteps"][:1], len(sample)), np.zeros(pictures, np.int32)
    for k in range(len(plan)):
        assert (index == k).all() and (timestep == np.float32(plan.timesteps[k])).all()
        noise = next(drawn) if plan.draws[k] else noise  # where none is taken, the last one stays
        output = network(sample, timestep, guided=guidance is not None)
        feeds = fixed | {"state": state, "model_output": output, "noise": noise, "index": index}
        check_feeds(signature.inputs, feeds)
        state, sample, timestep, index = runner.run([spec.name for spec in signature.outputs], feeds)
    assert (index == len(plan)).all() and (timestep == 0).all()
    latents_out: Array = state[:, 0]
    return latents_out


def first_state(plan: SamplingPlan, latents: Array, states: int | None = None) -> Array:
    """(B, S, C, h, w) float32 for latents (B, C, h, w); `states`: S, where it is more than the plan's own."""
    state = np.zeros((len(latents), states or plan.coefficients.shape[1], *latents.shape[1:]), np.float32)
    state[:, 0] = latents
    return state


def on_host(plan: SamplingPlan, latents: Array, draws: Array, guidance: float | None) -> Array:
    """The same loop in numpy, by the plan's own `advance`."""
    state, drawn = plan.initial_state(latents), iter(draws)
    for k in range(len(plan)):
        current, timestep = state[0].reshape(latents.shape), plan.timesteps[k : k + 1].astype(np.float32)
        if guidance is not None:
            both = network(np.concatenate([current, current]), timestep, guided=True)
            negative, positive = np.split(both, 2)
            output = negative + np.float32(guidance) * (positive - negative)
        else:
            output = network(current, timestep, guided=False)
        noise = next(drawn).ravel() if plan.draws[k] else None
        state = plan.advance(k, state, output.ravel(), noise)
    return state[0].reshape(latents.shape)


def relative_error(got: Array, expected: Array) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("guidance", [None, 3.0], ids=["plain", "guided"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_graph_advances_as_the_plan_does(sampler: str, guidance: float | None, sessions: dict[bool, Any]) -> None:
    plan = plan_of(sampler, 13)
    random = np.random.default_rng(3)
    latents = random.standard_normal(SHAPE, np.float32) * np.float32(plan.init_noise_scale)
    draws = random.standard_normal((int(plan.draws.sum()), *SHAPE), np.float32)
    got = on_graph(sessions[guidance is not None], plan, latents, draws, guidance)
    assert relative_error(got, on_host(plan, latents, draws, guidance)) < 1e-5


class Slot:
    """One picture of a request, and where its plan lies in the common table."""

    def __init__(self, sampler: str, steps: int, start: int, random: np.random.Generator) -> None:
        self.plan, self.start, self.place = plan_of(sampler, steps), start, 0
        self.scale = np.float32(random.uniform(1.5, 4))
        self.first = random.standard_normal((1, *SHAPE[1:]), np.float32) * np.float32(self.plan.init_noise_scale)
        self.draws = random.standard_normal((int(self.plan.draws.sum()), 1, *SHAPE[1:]), np.float32)
        self.drawn, self.state = iter(self.draws), first_state(self.plan, self.first, STATES)

    @property
    def done(self) -> bool:
        return self.place == len(self.plan)

    def noise(self) -> Array:
        return next(self.drawn) if self.plan.draws[self.place] else np.zeros_like(self.first)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_every_slot_has_its_own_sampler_step_and_guidance(guided: bool, sessions: dict[bool, Any]) -> None:
    """Pictures of different requests in one evaluation: every sampler beside others at other steps, its state padded
    to the most that any keeps, against its own run alone."""
    random, slots = np.random.default_rng(5), list[Slot]()
    for number, sampler in enumerate(SAMPLERS):
        start = slots[-1].start + len(slots[-1].plan) if slots else 0
        slots.append(Slot(sampler, 5 + number % 4, start, random))
    fixed = {
        "coefficients": np.concatenate([slot.plan.table(STATES) for slot in slots]),
        "timesteps": np.concatenate([*(slot.plan.timesteps for slot in slots), [0]]).astype(np.float32),
    }
    while waiting := [slot for slot in slots if not slot.done]:
        chosen = [waiting[n] for n in random.permutation(len(waiting))[:4]]
        index = np.array([slot.start + slot.place for slot in chosen], np.int32)
        sample = np.concatenate([slot.state[:, 0] for slot in chosen] * (2 if guided else 1))
        moments = np.tile(fixed["timesteps"][index], 2 if guided else 1)
        own = {
            "state": np.concatenate([slot.state for slot in chosen]),
            "model_output": network(sample, moments, guided=guided),
            "noise": np.concatenate([slot.noise() for slot in chosen]),
            "index": index,
        } | ({"guidance_scale": np.array([slot.scale for slot in chosen])} if guided else {})
        state, _, timestep, following = sessions[guided].run(None, fixed | own)
        assert np.array_equal(following, index + 1)
        assert np.array_equal(timestep, np.tile(fixed["timesteps"][following], 2 if guided else 1))
        for slot, after in zip(chosen, state, strict=True):
            slot.state, slot.place = after[None], slot.place + 1
    for sampler, slot in zip(SAMPLERS, slots, strict=True):
        alone = on_host(slot.plan, slot.first, slot.draws, slot.scale if guided else None)
        assert relative_error(slot.state[:, 0], alone) < 1e-5, sampler


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m_karras", "plms"])
def test_image_to_image_plans_run_on_the_graph(sampler: str, sessions: dict[bool, Any]) -> None:
    plan = plan_of(sampler, 20, strength=0.6)
    random = np.random.default_rng(4)
    latents = random.standard_normal(SHAPE, np.float32)
    draws = random.standard_normal((int(plan.draws.sum()), *SHAPE), np.float32)
    got = on_graph(sessions[True], plan, latents, draws, 5.0)
    assert relative_error(got, on_host(plan, latents, draws, 5.0)) < 1e-5


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_is_for_every_tensorrt(guided: bool) -> None:
    """Opset 17, 32-bit integers at the edge, no scalars: what TensorRT 8.5's parser takes as it is."""
    model = step_graph(SIZES, guided=guided)
    assert [opset.version for opset in model.opset_import] == [17]
    signature = step_signature(SIZES, guided=guided)
    for spec in (*signature.inputs, *signature.outputs):
        assert spec.shape and spec.dtype in ("float32", "int32")
    assert_same_edge(model, signature)


def test_pixels_are_those_of_the_host() -> None:
    model = pixels_graph()
    assert_same_edge(model, pixels_signature(SIZES))
    runner = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    samples = np.random.default_rng(6).standard_normal((2, 3, 64, 72), np.float32)
    samples[0, 0, 0, :8] = np.linspace(-1, 1, 8)
    samples[0, 0, 1, :3] = (2 * np.array([0.5, 1.5, 2.5]) / 255 - 1).astype(np.float32)  # halves go to even
    assert np.array_equal(runner.run(None, {"sample": samples})[0], to_pixels(samples))


def assert_same_edge(model: Any, signature: Signature) -> None:
    assert [value.name for value in model.graph.input] == [spec.name for spec in signature.inputs]
    assert [value.name for value in model.graph.output] == [spec.name for spec in signature.outputs]
