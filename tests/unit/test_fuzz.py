"""Whatever is read from files, pictures and prompts: a value, or an error in one line.  scripts/fuzz runs longer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_targets import TARGETS, Target
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_every_reader_takes_or_refuses(target: Target, tmp_path: Path) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck), phases=(Phase.generate,), database=None)
    @given(target.inputs())
    def check(value: Any) -> None:
        with np.errstate(all="ignore"):
            target.check(value, tmp_path)

    check()


def test_a_target_tells_an_exception_of_another_kind(tmp_path: Path) -> None:
    def broken(value: object, folder: Path) -> None:
        raise KeyError(value)

    with pytest.raises(KeyError):
        Target("broken", lambda: st.none(), broken).check(None, tmp_path)


def test_the_seeds_are_read(tmp_path: Path) -> None:
    """What is edited is valid to begin with, else only the first check of a reader would be reached."""
    from fuzz_targets import FOREIGN, WEIGHTS, _members, _picture, _schedulers, _tokenizer

    seeds = {
        "manifest": [_members()["manifest.json"]],
        "tokenizer": [_tokenizer()],
        "safetensors": WEIGHTS,
        "textual inversion": WEIGHTS[:1],
        "scheduler": [json.dumps(config).encode() for config in _schedulers()],
        "picture of others": [_picture(("parameters", json.dumps(FOREIGN[0]).encode()))],
    }
    for name, values in seeds.items():
        for value in values:
            TARGETS[name].read(value, tmp_path)


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "NaN", "1e999"])
def test_numbers_beyond_all_floats(tmp_path: Path, number: str) -> None:
    """Found by scripts/fuzz: a whole number that no float holds, where a float belongs."""
    for field in ("guidance_scale", "strength", "eta", "seed", "width"):
        line = f'{{"prompt": "a", "{field}": {number}}}'.encode()
        TARGETS["prompts file"].check(line, tmp_path)
