"""The loop on the device against the loop on the host, by ONNX Runtime and by TensorRT on the fake GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeGpu
from fake_onnxruntime import FakeOnnxRuntime
from sd_runtime.engines.gpu.gpu import Gpu
from sd_runtime.engines.onnxruntime_.cuda import OnnxRuntimeCudaEngine
from sd_runtime.errors import EngineError, NumericalError, OutOfMemoryError
from sd_runtime.loop.device import IDLE_LOOPS, DeviceDenoiser
from sd_runtime.loop.guidance import Guidance
from sd_runtime.loop.host import Evaluated, denoise
from sd_runtime.noise import NoiseSource
from sd_runtime.sampling import SamplingPlan, SchedulerConfig, describe, make_plan, resolve
from tensorrt_rig import (
    Rig,
    exact_range,
    onnxruntime_cuda_steps,
    onnxruntime_cuda_unet,
    onnxruntime_unet,
    rig,
    unet_shapes,
    version,
)
from tiny_graphs import TOKENS, WIDTH

__all__ = ["rig", "version"]  # fixtures
newest = pytest.mark.parametrize("version", ["11.4.0"])

SAMPLERS = [name.removesuffix("[_karras|_exponential]") for name, _ in describe()] + ["dpmpp_2m_karras"]
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


def plan_of(sampler: str, steps: int) -> SamplingPlan:
    return make_plan(SchedulerConfig.from_dict(STABLE_DIFFUSION).switched(resolve(sampler)), steps)


def arguments(
    plan: SamplingPlan, *, guidance: float = 7.5, images: int = 1, size: tuple[int, int] = (8, 9), seed: int = 0
) -> dict[str, Any]:
    """What both loops take; made anew for each of them, since noise is used up."""
    random = np.random.default_rng(seed)
    latents = random.standard_normal((images, 4, *size), np.float32) * np.float32(plan.init_noise_scale)
    hidden = random.standard_normal((images * (2 if guidance > 1 else 1), TOKENS, WIDTH), np.float32)
    return {
        "plan": plan,
        "latents": latents,
        "encoder_hidden_states": hidden,
        "guidance": Guidance(guidance),
        "noise": NoiseSource([seed + i for i in range(images)], "cpu"),
    }


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def engines(module_patch: pytest.MonkeyPatch) -> tuple[OnnxRuntimeCudaEngine, dict[str, OnnxRuntimeCudaEngine]]:
    """The tiny UNet and the sampler step by ONNX Runtime, on a fake GPU."""
    fake = FakeGpu().install(module_patch)
    FakeOnnxRuntime(fake).install(module_patch)
    gpu = Gpu()
    return onnxruntime_cuda_unet(gpu), onnxruntime_cuda_steps(gpu)


@pytest.fixture
def bound(
    engines: tuple[OnnxRuntimeCudaEngine, dict[str, OnnxRuntimeCudaEngine]],
) -> Iterator[DeviceDenoiser]:
    unet, steps = engines
    denoiser = DeviceDenoiser(unet, steps)
    yield denoiser
    denoiser.close()


def on_host(**given: Any) -> list[Evaluated]:
    return list(denoise(onnxruntime_unet(), **given))


def assert_same(steps: list[Evaluated], expected: list[Evaluated]) -> None:
    assert [(s.index, s.total, s.timestep) for s in steps] == [(s.index, s.total, s.timestep) for s in expected]
    for step, other in zip(steps, expected, strict=True):
        assert np.abs(step.latents - other.latents).max() <= 1e-5 * np.abs(other.latents).max()


# ---- the loop itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 7.5], ids=["plain", "guided"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_of_every_sampler_is_the_hosts(sampler: str, guidance: float, bound: DeviceDenoiser) -> None:
    plan = plan_of(sampler, 9)
    assert_same(
        list(bound(**arguments(plan, guidance=guidance, images=2))),
        on_host(**arguments(plan, guidance=guidance, images=2)),
    )


def test_loops_are_used_again_whatever_the_number_of_steps(bound: DeviceDenoiser) -> None:
    """What one run leaves in the state, the tables or the noise must not reach the next."""
    for sampler, steps in (("euler_a", 20), ("euler", 12), ("euler", 70), ("euler_a", 5), ("ddim", 1)):
        plan = plan_of(sampler, steps)
        assert_same(list(bound(**arguments(plan, seed=steps))), on_host(**arguments(plan, seed=steps)))


def test_steps_outlive_the_loop(bound: DeviceDenoiser) -> None:
    plan = plan_of("dpmpp_2m", 6)
    steps = list(bound(**arguments(plan)))
    kept = [step.latents.copy() for step in steps]
    list(bound(**arguments(plan, seed=1)))
    assert all(np.array_equal(step.latents, latents) for step, latents in zip(steps, kept, strict=True))


def test_nan_is_told_with_its_step_and_does_not_stay(bound: DeviceDenoiser) -> None:
    plan = plan_of("euler", 7)
    given = arguments(plan)
    given["encoder_hidden_states"] = np.full_like(given["encoder_hidden_states"], np.nan)
    with pytest.raises(NumericalError, match=r"latents after step 1 of 7 \(timestep 999\)"):
        list(bound(**given))
    assert_same(list(bound(**arguments(plan))), on_host(**arguments(plan)))


# ---- by TensorRT -----------------------------------------------------------------------------------------------------


@pytest.fixture
def denoiser(rig: Rig) -> DeviceDenoiser:
    return DeviceDenoiser(rig.unet(), rig.steps())


@pytest.mark.parametrize(("sampler", "guidance"), [("euler_a", 7.5), ("dpmpp_2m_karras", 1.0), ("plms", 5.0)])
def test_tensorrt_draws_what_the_host_draws(rig: Rig, denoiser: DeviceDenoiser, sampler: str, guidance: float) -> None:
    plan = plan_of(sampler, 8)
    given = {"guidance": guidance, "images": 2}
    assert_same(list(denoiser(**arguments(plan, **given))), on_host(**arguments(plan, **given)))


def test_exact_engines_draw_the_same(rig: Rig) -> None:
    shapes = unet_shapes(2)
    denoiser, plan = DeviceDenoiser(rig.unet(exact_range(shapes)), rig.steps()), plan_of("euler", 6)
    assert_same(list(denoiser(**arguments(plan))), on_host(**arguments(plan)))


@pytest.mark.parametrize("version", ["8.5.3", "8.6.1"])
def test_where_only_the_unet_can_be_recorded_the_step_follows_its_graph(rig: Rig) -> None:
    """TensorRT 8 has one context for all shapes of the step."""
    denoiser, plan = DeviceDenoiser(rig.unet(exact_range(unet_shapes(2))), rig.steps()), plan_of("dpmpp_2m", 6)
    for seed in range(2):
        rig.fake_gpu.log.clear()
        assert_same(list(denoiser(**arguments(plan, seed=seed))), on_host(**arguments(plan, seed=seed)))
    evaluation = ["graph", "enqueue out_sample", "enqueue next_state,next_sample,next_timestep,next_index", "copy"]
    assert rig.fake_gpu.log[-4 * len(plan) :] == evaluation * len(plan)
    denoiser.close()


@newest
def test_an_evaluation_is_one_graph_launch_and_one_copy(rig: Rig, denoiser: DeviceDenoiser) -> None:
    """Captured in this order, replayed once an evaluation; nothing goes up in between, and the latents come back."""
    plan = plan_of("dpmpp_2m", 6)
    list(denoiser(**arguments(plan)))
    rig.fake_gpu.log.clear()
    list(denoiser(**arguments(plan, seed=1)))
    evaluation = ["graph", "enqueue out_sample", "enqueue next_state,next_sample,next_timestep,next_index", "copy"]
    uploads = ["copy"] * 8  # sample, timestep, text, state, index, coefficients, timesteps, guidance scale
    assert [entry for entry in rig.fake_gpu.log if entry != "free"] == uploads + evaluation * len(plan)


@newest
def test_engines_that_cannot_be_captured_are_launched_one_by_one(
    rig: Rig, denoiser: DeviceDenoiser, caplog: pytest.LogCaptureFixture
) -> None:
    rig.fake.capturable = False
    plan = plan_of("euler_a", 5)
    assert_same(list(denoiser(**arguments(plan))), on_host(**arguments(plan)))
    assert "graph" not in rig.fake_gpu.log
    assert "not permitted when stream is capturing; the GPU is fed step by step" in caplog.records[0].getMessage()


@newest
def test_noise_goes_up_before_the_evaluation_that_takes_it(rig: Rig, denoiser: DeviceDenoiser) -> None:
    plan = plan_of("euler_a", 5)
    list(denoiser(**arguments(plan)))
    log = rig.fake_gpu.log
    launches = [place for place, entry in enumerate(log) if entry == "graph"]
    assert len(launches) == 5
    assert all(log[place - 1] == "copy" for place in launches)
    assert plan.draws.sum() == sum(log[place - 2] == "copy" for place in launches[1:]) + plan.draws[0]


def test_no_allocation_no_capture_no_context_once_the_shape_is_known(rig: Rig, denoiser: DeviceDenoiser) -> None:
    for sampler in ("euler_a", "euler"):
        list(denoiser(**arguments(plan_of(sampler, 6))))
    before, contexts = dict(rig.fake_gpu.memory.allocations), rig.fake.contexts_made
    for sampler, steps in (("euler_a", 20), ("euler", 4)):
        list(denoiser(**arguments(plan_of(sampler, steps), seed=steps)))
    assert rig.fake_gpu.memory.allocations == before
    assert rig.fake.contexts_made == contexts


@newest
def test_host_waits_once_an_evaluation_and_never_for_the_newest(rig: Rig, denoiser: DeviceDenoiser) -> None:
    plan = plan_of("euler", 10)
    list(denoiser(**arguments(plan)))
    waits = rig.fake_gpu.waits
    for step in denoiser(**arguments(plan)):
        assert (rig.fake_gpu.unfinished > 0) == (step.index < 9), "the GPU needs work while the host looks at a step"
    assert rig.fake_gpu.waits - waits == 10


def test_fault_29_cancelled_midway_runs_at_most_one_more_step(rig: Rig, denoiser: DeviceDenoiser) -> None:
    plan = plan_of("euler_a", 30)
    list(denoiser(**arguments(plan_of("euler_a", 2))))
    rig.fake_gpu.log.clear()
    steps = denoiser(**arguments(plan))
    for _ in range(4):
        next(steps)
    steps.close()
    rig.gpu.stream.sync()
    assert rig.fake_gpu.log.count("enqueue out_sample") == 5
    before = dict(rig.fake_gpu.memory.allocations)
    assert_same(list(denoiser(**arguments(plan, seed=1))), on_host(**arguments(plan, seed=1)))
    assert rig.fake_gpu.memory.allocations == before, "the cancelled run's loop was not given back"


def test_requests_that_overlap_do_not_touch_each_other(rig: Rig, denoiser: DeviceDenoiser) -> None:
    """Two of one shape and one of another, taking turns step by step."""
    plans = [plan_of("euler_a", 6), plan_of("dpmpp_2m", 6), plan_of("ddim", 6)]
    given: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}, {"seed": 3, "size": (16, 8)}]
    running = [denoiser(**arguments(plan, **more)) for plan, more in zip(plans, given, strict=True)]
    got: list[list[Evaluated]] = [[], [], []]
    for _ in range(6):
        for steps, out in zip(running, got, strict=True):
            out.append(next(steps))
    for out, plan, more in zip(got, plans, given, strict=True):
        assert_same(out, on_host(**arguments(plan, **more)))


def test_loops_that_were_not_used_for_long_make_room(rig: Rig, denoiser: DeviceDenoiser) -> None:
    plan = plan_of("euler", 2)
    used = []
    for width in range(8, 17):
        list(denoiser(**arguments(plan, size=(8, width))))
        rig.gpu.stream.sync()
        used.append(rig.fake_gpu.memory.live)
    assert len(set(used[IDLE_LOOPS:])) == 1
    denoiser.close()
    rig.gpu.stream.sync()
    assert rig.fake_gpu.memory.live < used[0]
    with pytest.raises(EngineError, match="the pipeline was closed"):
        list(denoiser(**arguments(plan)))


def test_fault_22_memory_for_a_new_shape_is_taken_from_idle_ones(rig: Rig, denoiser: DeviceDenoiser) -> None:
    plan, large = plan_of("euler", 3), {"size": (16, 16), "images": 4}
    list(denoiser(**arguments(plan)))
    rig.gpu.stream.sync()
    memory = rig.fake_gpu.memory
    memory.capacity = memory.used + 60_000
    with pytest.raises(OutOfMemoryError):
        list(denoiser(**arguments(plan, **large)))
    rig.gpu.stream.sync()
    assert_same(list(denoiser(**arguments(plan))), on_host(**arguments(plan)))
    memory.capacity = 1 << 30
    assert_same(list(denoiser(**arguments(plan, **large))), on_host(**arguments(plan, **large)))


def test_fault_22_idle_shapes_make_room_for_a_new_one(rig: Rig, denoiser: DeviceDenoiser) -> None:
    plan = plan_of("euler", 3)
    list(denoiser(**arguments(plan, size=(8, 16))))
    rig.gpu.stream.sync()
    memory = rig.fake_gpu.memory
    memory.capacity = memory.used + 1000
    other = {"size": (16, 8)}
    assert_same(list(denoiser(**arguments(plan, **other))), on_host(**arguments(plan, **other)))
    with pytest.raises(OutOfMemoryError):
        list(denoiser(**arguments(plan, size=(16, 16))))


def test_an_engine_that_fails_midway_leaves_nothing_behind(rig: Rig, denoiser: DeviceDenoiser) -> None:
    plan = plan_of("euler", 6)
    list(denoiser(**arguments(plan)))
    count = 0

    def fails_at_third(what: str) -> None:
        nonlocal count
        count += what == "enqueue out_sample"
        if count == 3 and what == "enqueue out_sample":
            raise RuntimeError("CUDA_ERROR_UNKNOWN: something passing")

    rig.fake_gpu.fail = fails_at_third
    got: list[Evaluated] = []
    with pytest.raises(EngineError, match="the GPU failed while running: CUDA_ERROR_UNKNOWN: "):
        got.extend(denoiser(**arguments(plan)))
    rig.fake_gpu.fail = lambda what: None
    assert_same(list(denoiser(**arguments(plan))), on_host(**arguments(plan)))


def test_graphs_keep_the_arena_that_they_were_recorded_with(rig: Rig) -> None:
    denoiser, plan = DeviceDenoiser(rig.unet(), rig.steps()), plan_of("euler", 4)
    list(denoiser(**arguments(plan)))
    first = rig.gpu.arena.block(0)
    large = rig.unet(activations=1 << 20)
    random = np.random.default_rng(0)
    large.run({name: random.standard_normal(shape, np.float32) for name, shape in unet_shapes(8, 16, 16).items()})
    assert rig.gpu.arena.block(0) is not first
    for images in (1, 2):  # the recorded shape, and one recorded in the new arena
        assert_same(list(denoiser(**arguments(plan, images=images))), on_host(**arguments(plan, images=images)))
    rig.gpu.stream.sync()
    before = rig.fake_gpu.memory.used
    denoiser.close()
    rig.gpu.stream.sync()
    assert rig.fake_gpu.memory.used < before


def test_closing_everything_gives_everything_back(rig: Rig) -> None:
    unet, steps = rig.unet(), rig.steps()
    denoiser = DeviceDenoiser(unet, steps)
    for scale in (1.0, 7.5):
        list(denoiser(**arguments(plan_of("euler_a", 3), guidance=scale)))
    denoiser.close()
    for engine in (unet, *steps.values()):
        engine.close()
    rig.gpu.close()
    rig.fake.engines.clear()
    assert rig.fake_gpu.memory.live == 0
    assert len(rig.fake.contexts) == 0
