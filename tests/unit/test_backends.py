"""The seam between a pipeline and what runs its networks: backends by name, backends of one's own, and their order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_backend import OwnBackend
from PIL import Image
from sd_runtime import Pipeline, UsageError
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.cli.run import main
from sd_runtime.engines.registry import BACKENDS
from sd_runtime.errors import EngineError
from sd_runtime.result import Result, Step
from sd_runtime.sampling import make_plan

PROMPT = "a large yellow star on a blue background"


@pytest.fixture
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


def test_a_backend_of_ones_own_draws_the_same_picture(bundle: Bundle, pipe: Pipeline) -> None:
    own = OwnBackend(bundle)
    with Pipeline.load(bundle, backends=[own]) as pipeline:
        result = pipeline(PROMPT, seed=3, num_inference_steps=4)
    expected = pipe(PROMPT, seed=3, num_inference_steps=4)
    assert np.abs(result.samples - expected.samples).max() < 1e-4
    assert own.calls == Counter(text_encoder=1, unet=5, vae_decoder=1)  # PNDM evaluates one timestep twice
    assert own.closed


def test_what_a_backend_does_not_have_the_next_one_runs(bundle: Bundle) -> None:
    first = OwnBackend(bundle, components=frozenset({"unet"}), name="first")
    second = OwnBackend(bundle, name="second")
    with Pipeline.load(bundle, backends=[first, second]) as pipeline:
        pipeline(PROMPT, seed=3, num_inference_steps=2)
    assert [name for name, _ in first.opened] == ["unet"]
    assert {name for name, _ in second.opened} == {"text_encoder", "vae_decoder"}


def test_what_no_backend_has_is_said(bundle: Bundle) -> None:
    only = OwnBackend(bundle, components=frozenset({"unet", "text_encoder"}))
    with pytest.raises(EngineError, match=r"no backend has an engine for vae_decoder \(plain\): got own"):
        Pipeline.load(bundle, backends=[only])
    assert only.closed


@pytest.mark.parametrize(
    ("backends", "message"),
    [
        (["torch"], "backends: got torch, accepted tensorrt, tensorrt_rtx, onnxruntime"),
        ("onnxruntime", r"backends: got onnxruntime, accepted a list of tensorrt, tensorrt_rtx, onnxruntime"),
        ([], "backends: got "),
    ],
)
def test_backends_that_cannot_be(bundle: Bundle, backends: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.load(bundle, backends=backends)


def test_a_named_backend_without_engines_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="none of the backends runs this bundle here: tensorrt"):
        Pipeline.load(bundle, backends=["tensorrt"])


def test_batches_are_those_that_the_backend_likes(bundle: Bundle, pipe: Pipeline) -> None:
    whole = pipe(PROMPT, seed=1, num_images_per_prompt=3, num_inference_steps=4)
    assert pipe.batches(whole.request) == (range(1), range(1, 2), range(2, 3))  # one by one on the CPU
    steps: list[Step] = []
    with Pipeline.load(bundle, backends=[OwnBackend(bundle, batches=(1, 2))]) as pipeline:
        parts = pipeline(PROMPT, seed=1, num_images_per_prompt=3, num_inference_steps=4, callback=steps.append)
    assert [step.images for step in steps] == [range(2)] * 5 + [range(2, 3)] * 5
    assert [step.index for step in steps] == list(range(10))
    assert np.abs(parts.samples - whole.samples).max() < 1e-3


def test_batches_are_handed_out_as_they_are_done(bundle: Bundle) -> None:
    """Steps and results in turn; each result is of its batch alone, and together they are the whole."""
    own = OwnBackend(bundle, batches=(1, 2))
    with Pipeline.load(bundle, backends=[own]) as pipeline:
        whole = pipeline(PROMPT, seed=1, num_images_per_prompt=3, num_inference_steps=3)
        own.calls.clear()
        decoded_by_then = []
        parts = []
        for item in pipeline.start(whole.request).results():
            if isinstance(item, Result):
                parts.append(item)
                decoded_by_then.append(own.calls["vae_decoder"])
    assert [part.indices for part in parts] == [range(2), range(2, 3)]
    assert [part.seeds for part in parts] == [(1, 2), (3,)]
    assert decoded_by_then == [2, 3]  # the first two pictures are decoded before the third is begun
    assert np.array_equal(np.concatenate([part.latents for part in parts]), whole.latents)
    assert [p for part in parts for p in part.parameters] == list(whole.parameters)


def test_a_stopped_batch_is_handed_out_as_far_as_it_came(bundle: Bundle) -> None:
    with Pipeline.load(bundle, backends=[OwnBackend(bundle, batches=(1, 2))]) as pipeline:
        request = pipeline(PROMPT, seed=1, num_images_per_prompt=3, num_inference_steps=3).request
        generation = pipeline.start(request)
        items = []
        for item in generation.results():
            items.append(item)
            if isinstance(item, Step) and item.index == 5:
                generation.stop()
    stopped = items[-1]
    assert isinstance(stopped, Result) and stopped.indices == range(2, 3)
    assert stopped.parameters[0].extra["Stopped after"] == "2 of 4 steps"


def test_the_command_line_encodes_prompt_and_picture_once(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sd-run --image x --num-images 4: the bundle opened, the picture read, prompt and picture encoded, the plan made
    once."""
    own: list[OwnBackend] = []

    def opener(bundle: Bundle, machine: Any) -> OwnBackend:
        own.append(OwnBackend(bundle))
        return own[-1]

    monkeypatch.setitem(BACKENDS, "counting", opener)
    opened, read = Counter[str](), Counter[str]()
    open_bundle, from_pictures = Bundle.open.__func__, __import__("sd_runtime.inputs", fromlist=["x"]).from_pictures

    def counted_open(cls: type[Bundle], root: Path) -> Bundle:
        opened["bundle"] += 1
        return open_bundle(cls, root)  # type: ignore[no-any-return]

    def counted_read(*given: Any, **more: Any) -> Any:
        read["picture"] += 1
        return from_pictures(*given, **more)

    monkeypatch.setattr(Bundle, "open", classmethod(counted_open))
    monkeypatch.setattr("sd_runtime.inputs.from_pictures", counted_read)
    Image.new("RGB", (128, 128), "red").save(tmp_path / "x.png")
    before = make_plan.cache_info().misses
    arguments = ["--model", str(demo_bundle), "--backend", "counting", "--steps", "10", "--strength", "0.37"]
    pictures = ["--image", str(tmp_path / "x.png"), "--num-images", "4", "--output", str(tmp_path / "y-{index}.png")]
    assert main([PROMPT, *arguments, *pictures, "--seed", "1", "--scheduler", "ddim", "--quiet"]) == 0
    assert len(list(tmp_path.glob("y-*.png"))) == 4
    (backend,) = own
    assert backend.calls == Counter(text_encoder=1, vae_encoder=1, unet=4 * 3, vae_decoder=4)
    assert (opened["bundle"], read["picture"], make_plan.cache_info().misses - before) == (1, 1, 1)
