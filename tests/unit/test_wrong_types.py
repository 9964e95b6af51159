"""Python's arguments of the wrong kind: what has an obvious meaning is taken, all else is one line, and ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sd_runtime import Pipeline, SDError, UsageError, make_request
from sd_runtime.inputs import as_latents
from sd_runtime.networks.vae import Decoded, decode, encode
from sd_runtime.sampling import resolve

PROMPT = "a red star"
FEW: dict[str, Any] = {"num_inference_steps": 2, "seed": 1}
NOISE = np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32)


class Tensor:
    """As torch's: an array that must be asked for; `refuse` is what numpy is told."""

    ndim = 4

    def __init__(self, array: np.ndarray, refuse: Exception | None = None) -> None:
        self.array, self.refuse, self.asked = array, refuse, list[str]()

    def detach(self) -> Tensor:
        self.asked.append("detach")
        return self

    def cpu(self) -> Tensor:
        self.asked.append("cpu")
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.refuse is not None:
            raise self.refuse
        return self.array


# ---- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "latents",
    [
        NOISE,
        NOISE.astype(np.float64),
        NOISE[0],
        NOISE.astype(">f4"),
        np.asfortranarray(NOISE),
        Tensor(NOISE),
        Tensor(NOISE.astype(np.float64)[0]),
    ],
    ids=["plain", "float64", "3-d", "big-endian", "columns first", "tensor", "3-d tensor"],
)
def test_latents_of_an_obvious_meaning(pipe: Pipeline, latents: Any) -> None:
    expected = pipe(PROMPT, latents=NOISE, **FEW)
    result = pipe(PROMPT, latents=latents, **FEW)
    assert np.array_equal(result.latents, expected.latents)
    assert result.parameters == expected.parameters
    assert np.array_equal(pipe.decode_latents(latents), pipe.decode_latents(NOISE))


def test_torchs_own_tensors(pipe: Pipeline) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(NOISE.copy()).requires_grad_()
    assert np.array_equal(as_latents("latents", tensor, (1, 4, 16, 16)), NOISE)
    assert np.array_equal(as_latents("latents", tensor.double()[0], (1, 4, 16, 16)), NOISE)
    half = tensor.detach().half()
    assert np.array_equal(as_latents("latents", half, (1, 4, 16, 16)), NOISE.astype(np.float16).astype(np.float32))
    with pytest.raises(UsageError, match=r"^latents: got Tensor, accepted float32\(1, 4, 16, 16\), a numpy array$"):
        as_latents("latents", tensor.bfloat16(), (1, 4, 16, 16))
    assert make_request(pipe.manifest.defaults, "a", seed=torch.tensor(5)).seeds == (5,)
    assert make_request(pipe.manifest.defaults, ["a", "b"], seed=torch.tensor([5, 7])).seeds == (5, 7)
    with pytest.raises(UsageError, match=r"^seed: got 1\.5"):
        make_request(pipe.manifest.defaults, "a", seed=torch.tensor(1.5))


@pytest.mark.parametrize(
    ("latents", "got"),
    [
        (NOISE[:, :3], "float32(1, 3, 16, 16)"),
        (NOISE[0, 0], "float32(16, 16)"),
        (NOISE.astype(np.int64), "int64(1, 4, 16, 16)"),
        (NOISE.astype(np.complex64), "complex64(1, 4, 16, 16)"),
        (NOISE.tolist(), "list"),
        ("noise", "str"),
        (b"noise", "bytes"),
        (Tensor(NOISE, TypeError("bfloat16")), "Tensor"),
        (np.full((1, 4, 16, 16), 1e300), "NaN or infinity"),
        (np.full((1, 4, 16, 16), np.nan, np.float32), "NaN or infinity"),
    ],
)
def test_latents_that_are_none(pipe: Pipeline, latents: Any, got: str) -> None:
    for call in (lambda: pipe(PROMPT, latents=latents, **FEW), lambda: pipe.decode_latents(latents)):
        with pytest.raises(UsageError, match=rf"^latents: got {re.escape(got)}, accepted "):
            call()


# ---- seeds and lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [
        (np.int64(5), (5, 6)),
        (np.uint64(2**63), (2**63, 2**63 + 1)),
        (np.array(5), (5, 6)),
        (np.array([5, 9]), (5, 9)),
        (np.array([5, 9], np.uint8), (5, 9)),
        ((5, 9), (5, 9)),
        (range(5, 7), (5, 6)),
    ],
)
def test_seeds_of_an_obvious_meaning(pipe: Pipeline, seed: Any, seeds: tuple[int, ...]) -> None:
    assert make_request(pipe.manifest.defaults, PROMPT, seed=seed, num_images_per_prompt=2).seeds == seeds


def test_arrays_of_texts_and_numpys_numbers(pipe: Pipeline) -> None:
    request = make_request(
        pipe.manifest.defaults, np.array(["a", "b"]), height=np.int32(64), guidance_scale=np.float32(2),  # type: ignore[arg-type]
    )  # fmt: skip
    assert (request.prompts, request.height, request.guidance_scale) == (("a", "b"), 64, 2)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seed": np.array([1.5, 2.5])}, "number of seeds: got 2, accepted 1"),
    ({"seed": np.array([1.5])}, "seed: got 1.5, accepted an integer"),
    ({"seed": np.zeros((1, 1), int)}, "seed: got array([[0]]), accepted one value, or a list"),
    ({"seed": {"a": 1}}, "seed: got {'a': 1}, accepted one value, or a list"),
    ({"seed": True}, "seed: got True, accepted one value, or a list"),
    ({"prompt": None}, "prompt: got None, accepted one value, or a list"),
    ({"prompt": b"a star"}, "prompt: got b'a star', accepted one value, or a list"),
    ({"prompt": {"a": 1}}, "prompt: got {'a': 1}, accepted one value, or a list"),
    ({"prompt": [b"a"]}, "prompt: got bytes, accepted text"),
    ({"negative_prompt": 3}, "negative_prompt: got 3, accepted one value, or a list"),
    (
        {"scheduler": {"_class_name": "DDIMScheduler"}},
        "scheduler: got {'_class_name': 'DDIMSch",
    ),
    ({"scheduler": object}, "scheduler: got <class 'object'>, accepted a sampler's name, such as euler_a"),
    ({"guidance_scale": np.array(2.0)}, "guidance_scale: got array(2.), accepted numbers from 0 to 100"),
    ({"height": "64"}, "height: got 64, accepted whole numbers"),
    ({"image": 3}, "picture: got int, accepted a PIL image, a path or an array"),
    ({"image": b"png"}, "picture: got bytes, accepted a PIL image, a path or an array"),
    ({"image": {"a": 1}}, "picture: got dict, accepted a PIL image, a path or an array"),
    ({"image": [None]}, "picture: got NoneType, accepted a PIL image, a path or an array"),
    ({"image": Tensor(NOISE)}, "picture: got Tensor, accepted a PIL image, a path or an array"),
    ({"callback": 3}, "callback: got 3, accepted a function of a Step"),
    ({"num_steps": 3}, "argument: got num_steps, accepted "),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_arguments_of_a_wrong_kind(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=rf"^{re.escape(message)}"):
        pipe(**({"prompt": PROMPT} | FEW | arguments))


@pytest.mark.parametrize("request_", ["a star", ["a star"], {"prompt": "a star"}, None, 3])
def test_what_is_no_request(pipe: Pipeline, request_: Any) -> None:
    methods = (pipe.start, pipe.inputs, pipe.prepare, pipe.check, pipe.encode_prompts, pipe.plan, pipe.guidance)
    for method in (*methods, pipe.notices, lambda request: pipe.parameters(request, 0)):
        with pytest.raises(UsageError, match=r"^request: got .*, accepted a Request; call the pipeline with"):
            method(request_)  # type: ignore[operator]


def test_what_is_not_prepared(pipe: Pipeline) -> None:
    for wrong in ("a star", make_request(pipe.manifest.defaults, PROMPT), None):
        with pytest.raises(UsageError, match=r"^prepared: got .*, accepted what `prepare` gives$"):
            pipe.generate(wrong)  # type: ignore[arg-type]
    for name in ("width", "height"):
        for size in ("64", 64.0, 0, True):
            with pytest.raises(UsageError, match=rf"^{name}: got {size}, accepted whole numbers"):
                pipe.encode_image(np.zeros((8, 8, 3), np.uint8), **{name: size})  # type: ignore[arg-type]


def test_a_scheduler_configuration_of_another_library(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "scheduler_config", {"_class_name": "DDIMScheduler"})
    with pytest.raises(UsageError, match=r"^scheduler_config: got dict, accepted SchedulerConfig; make one with"):
        pipe(PROMPT, **FEW)
    for name in ({}, [], None, 3):
        with pytest.raises(UsageError, match=r"^scheduler: got .*, accepted a sampler's name"):
            resolve(name)  # type: ignore[arg-type]


def test_a_word_that_is_no_text(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy_file = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.safetensors"
    numpy_file.save_file({"emb_params": np.ones((1, 64), np.float32)}, path)
    with pytest.raises(UsageError, match=r"^textual inversion: word: got U\+D800 at character 1, accepted Unicode"):
        pipe.load_textual_inversion(path, "a\ud800")
    for wrong in (3, {"a": 1}, None, b"x"):
        with pytest.raises(UsageError, match=r"^textual inversion: got \w+, accepted the path of a \.safetensors"):
            pipe.load_textual_inversion(wrong)  # type: ignore[arg-type]
    assert not pipe.prompts.inversions


@pytest.mark.parametrize("name", ["a\ud800", "a\0b", "~nosuch/demo", "x" * 5000])
def test_names_that_no_bundle_can_have(name: str) -> None:
    with pytest.raises(SDError, match=r"^(unknown model|cannot read)"):
        Pipeline.load(name)


def test_the_home_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_LEAN_HOME", "~nosuch/models")
    with pytest.raises(UsageError, match=r"^SD_LEAN_HOME: got ~nosuch/models, accepted a folder; there is no user of"):
        Pipeline.load("demo")


# ---- the network that went wrong is named ----------------------------------------------------------------------------


class Broken:
    """An engine whose output is infinite."""

    inputs = outputs = ()

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.output = {name: np.full(shape, np.inf, np.float32)}

    def run(self, feeds: Any) -> Any:
        return self.output


def test_fault_23_the_right_network_is_named(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder: Any = Broken("sample", (1, 3, 8, 8))
    with pytest.raises(SDError, match=r"^VAE decoder output of picture 1: got NaN or infinity; export"):
        decode(decoder, NOISE, 1.0)
    with pytest.raises(SDError, match=r"^tiny decoder \(TAESD\) output of picture 1: got NaN or infinity; export"):
        decode(decoder, NOISE, 1.0, "tiny decoder (TAESD)")
    encoder: Any = Broken("latent_parameters", (1, 8, 1, 1))
    with pytest.raises(SDError, match=r"^VAE encoder output of picture 1: got NaN or infinity; export"):
        encode(encoder, np.zeros((1, 3, 8, 8), np.float32), 1.0)
    with pytest.raises(SDError, match=r"^samples of picture 1: got NaN or infinity$"):
        encode(encoder, np.full((1, 3, 8, 8), np.nan, np.float32), 1.0)
    with pytest.raises(SDError, match=r"^latents of picture 1: got NaN or infinity$"):
        pipe.loops.decode(np.full((1, 4, 16, 16), np.nan, np.float32))
    assert Decoded(np.zeros((1, 3, 8, 8), np.float32)).pixels is None
