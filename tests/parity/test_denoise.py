"""The guided loop on a fake UNet: what the UNet is fed, how guidance combines, what happens when numbers go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from fakes import FakeUNet
from sd_runtime.engines.protocol import Feed, Placed
from sd_runtime.errors import NumericalError
from sd_runtime.loop.guidance import Guidance, guide
from sd_runtime.loop.host import denoise
from sd_runtime.networks.unet import embed_guidance
from sd_runtime.noise import NoiseSource
from sd_runtime.sampling import SamplingPlan, SchedulerConfig, make_plan, resolve
from sd_runtime.tensor import Array

CONFIG = SchedulerConfig.from_dict(
    {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
     "skip_prk_steps": True, "steps_offset": 1}
)  # fmt: skip
SHAPE = (2, 4, 8, 8)
TEXT = np.stack([np.full((77, 8), value, np.float32) for value in (0.0, 0.0, 1.0, 2.0)])  # 2 negative rows, 2 prompts


def plan(name: str = "euler", steps: int = 5) -> SamplingPlan:
    return make_plan(CONFIG.switched(resolve(name)), steps)


def latents() -> Array:
    return NoiseSource([1, 2]).draw(SHAPE[1:])


def run(unet: FakeUNet, guidance: Guidance, hidden: Array, name: str = "euler") -> Array:
    *_, last = denoise(unet, plan(name), latents(), hidden, guidance, NoiseSource([1, 2]))
    return last.latents.copy()


def test_every_evaluation_is_run_and_yielded_in_order() -> None:
    unet = FakeUNet(lambda sample, t, hidden: sample * 0.1)
    steps = list(denoise(unet, plan(), latents(), TEXT, Guidance(7.5), NoiseSource([1, 2])))
    assert [s.index for s in steps] == [0, 1, 2, 3, 4]
    assert [s.timestep for s in steps] == pytest.approx(unet.timesteps)
    assert all(s.total == 5 and s.latents.shape == SHAPE for s in steps)


def test_guidance_doubles_the_rows_negative_first() -> None:
    """The fake's output is its text, 0 for the negative prompts: scale 1.5 must equal scale 1 with 1.5 · text."""
    fake = FakeUNet(lambda sample, t, hidden: np.broadcast_to(hidden[:, :1, :1, None], sample.shape).astype(np.float32))
    guided = run(fake, Guidance(1.5), TEXT)
    plain = run(fake, Guidance(1.0), TEXT[2:] * 1.5)
    np.testing.assert_allclose(guided, plain, rtol=1e-5, atol=1e-6)


def test_without_guidance_one_row_a_picture() -> None:
    rows: list[int] = []

    def model(sample: Array, t: float, hidden: Array) -> Array:
        rows.append(len(sample))
        return sample * 0.1

    run(FakeUNet(model), Guidance(1.0), TEXT[2:])
    run(FakeUNet(model), Guidance(7.5), TEXT)
    assert rows == [2] * 5 + [4] * 5


def test_pictures_of_a_batch_do_not_mix() -> None:
    """Each picture alone gives what it gives in the batch, ancestral noise included."""
    unet = FakeUNet(lambda sample, t, hidden: np.tanh(sample) * 0.3)
    together = run(unet, Guidance(7.5), TEXT, "euler_a")
    for i, seed in enumerate((1, 2)):
        first = NoiseSource([seed]).draw(SHAPE[1:])
        *_, last = denoise(unet, plan("euler_a"), first, TEXT[i::2], Guidance(7.5), NoiseSource([seed]))
        np.testing.assert_allclose(last.latents[0], together[i], rtol=1e-6, atol=1e-6)


def test_stopping_runs_no_further_step() -> None:
    unet = FakeUNet(lambda sample, t, hidden: sample)
    steps = denoise(unet, plan(), latents(), TEXT, Guidance(7.5), NoiseSource([1, 2]))
    next(steps), next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert len(unet.timesteps) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_names_the_step(value: float) -> None:
    def model(sample: Array, t: float, hidden: Array) -> Array:
        bad = sample.copy()
        bad[-1, 0, 0, 0] = value if len(unet.timesteps) == 3 else 0
        return bad

    unet = FakeUNet(model)
    with pytest.raises(NumericalError, match=r"UNet output in step 3 of 5 \(timestep .*\): got NaN or infinity"):
        run(unet, Guidance(7.5), TEXT)


def test_fault_23_the_network_is_not_blamed_for_guidance_or_for_the_sampler() -> None:
    """Finite predictions that guidance brings beyond float32, or that leave such latents behind."""
    huge = np.float32(3e38)
    opposite = FakeUNet(lambda sample, t, hidden: np.where(hidden[:, :1, :1, None] > 0, huge, -huge) + 0 * sample)
    with pytest.raises(NumericalError, match=r"^prediction after guidance in step 1 of 5 .*; lower `guidance_scale`"):
        run(opposite, Guidance(7.5), TEXT)
    steep = replace(plan(), coefficients=plan().coefficients * 1e20)
    steps = denoise(
        FakeUNet(lambda sample, t, hidden: sample), steep, latents(), TEXT[2:], Guidance(1), NoiseSource([1])
    )
    with pytest.raises(NumericalError, match=r"^latents before step 3 of 5 .* or take another sampler$"):
        list(steps)


def test_rescaled_guidance_is_diffusers() -> None:
    output = np.random.default_rng(0).standard_normal((4, 4, 8, 8), np.float32)
    ours = guide(output, Guidance(7.5, 0.7))
    uncond, text = torch.from_numpy(output).chunk(2)
    theirs = rescale_noise_cfg(uncond + 7.5 * (text - uncond), text, guidance_rescale=0.7)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("width", [256, 255, 32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 8.5])
def test_guidance_embedding_is_diffusers(scale: float, width: int) -> None:
    """Within what one last digit of a frequency changes at angles of up to 7500 radians."""
    told = torch.tensor([scale - 1])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, told, embedding_dim=width)[0]
    np.testing.assert_allclose(embed_guidance(scale, width), theirs.numpy(), rtol=0, atol=6e-4)


def test_a_network_that_guides_itself_is_told_the_scale() -> None:
    guidance = Guidance(8.5, width=32)
    assert not guidance.on
    (told,) = guidance.inputs(3).values()
    assert told.shape == (3, 32) and told.dtype == np.float32
    np.testing.assert_array_equal(told[2], embed_guidance(8.5, 32))
    assert Guidance(8.5).on and not Guidance(8.5).inputs(3)


@pytest.mark.parametrize("steps", [2, 5])
def test_what_was_placed_for_the_network_is_given_back(steps: int) -> None:
    """Also when the loop is left before its end."""
    closed: list[str] = []

    class Handle:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    class Placing(FakeUNet):
        def place(self, name: str, array: Array) -> Placed:
            return Placed(Handle(name), array.shape, array.dtype)

        def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
            assert isinstance(feeds["encoder_hidden_states"], Placed) and not closed
            return super().run({**feeds, "encoder_hidden_states": TEXT})

    unet = Placing(lambda sample, t, hidden: sample * 0.1)
    with closing(denoise(unet, plan(), latents(), TEXT, Guidance(7.5), NoiseSource([1, 2]))) as loop:
        for _ in zip(range(steps), loop, strict=False):
            pass
    assert closed == ["encoder_hidden_states"]
