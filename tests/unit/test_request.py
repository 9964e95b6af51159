"""request: every argument out of range is one UsageError that names the argument, what was got and what is accepted."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_runtime.errors import UsageError
from sd_runtime.request import Defaults, Request, make_request

DEFAULTS = Defaults(num_inference_steps=25, guidance_scale=4.0, height=128, width=128)


def test_defaults_come_from_the_bundle() -> None:
    request = make_request(DEFAULTS, "a star", seed=0)
    assert (request.num_inference_steps, request.guidance_scale) == (25, 4.0)
    assert (request.height, request.width, request.seeds) == (128, 128, (0,))


def test_zero_is_a_value_not_an_absence() -> None:
    assert make_request(DEFAULTS, "x", guidance_scale=0).guidance_scale == 0
    assert make_request(DEFAULTS, "x", seed=0).seeds == (0,)
    assert make_request(DEFAULTS, "x", seed=0) == make_request(DEFAULTS, "x", seed=0)


def test_pictures_are_prompt_major() -> None:
    request = make_request(DEFAULTS, ["a", "b"], negative_prompt="n", num_images_per_prompt=2, seed=7)
    assert [request.prompt_of(i) for i in range(4)] == ["a", "a", "b", "b"]
    assert request.negative_prompts == ("n", "n")
    assert request.seeds == (7, 8, 9, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "number of prompts: got 0"),
        ({"prompt": 3}, "prompt: got 3"),
        ({"prompt": [None]}, "prompt: got NoneType, accepted text"),
        ({"prompt": "a\ud800b"}, r"prompt: got U\+D800 at character 1"),
        ({"negative_prompt": ["a", "b"]}, "number of negative_prompts: got 2, accepted 1 or 1"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"seed": True}, "seed: got True"),
        ({"seed": 1.5}, "seed: got 1.5"),
        ({"seed": [1, 2]}, "number of seeds: got 2"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0, accepted whole numbers from 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps: got 1001"),
        ({"num_inference_steps": 2.0}, "num_inference_steps: got 2.0"),
        ({"guidance_scale": math.nan}, "guidance_scale: got nan, accepted numbers from 0 to 100"),
        ({"guidance_scale": math.inf}, "guidance_scale: got inf"),
        ({"guidance_scale": -1}, "guidance_scale: got -1"),
        ({"guidance_scale": "7"}, "guidance_scale: got 7"),
        ({"guidance_rescale": 1.5}, "guidance_rescale: got 1.5"),
        ({"eta": -0.1}, "eta: got -0.1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: got 0"),
        ({"rng": "mps"}, "rng: got mps, accepted cpu, cuda"),
        ({"height": 0}, "height: got 0"),
    ],
)
def test_out_of_range(arguments: dict[str, Any], message: str) -> None:
    arguments = {"prompt": "x"} | arguments
    with pytest.raises(UsageError, match=message):
        make_request(DEFAULTS, arguments.pop("prompt"), **arguments)


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())
ARGUMENTS = ("seed", "height", "guidance_scale", "eta", "rng", "num_inference_steps", "negative_prompt", "strength")


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(ARGUMENTS, ANYTHING)), ANYTHING)
def test_fault_35_anything_is_a_request_or_a_usage_error(arguments: dict[str, Any], prompt: Any) -> None:
    with suppress(UsageError):
        assert isinstance(make_request(DEFAULTS, prompt, **arguments), Request)
