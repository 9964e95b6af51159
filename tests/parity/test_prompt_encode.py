"""encode_prompts against diffusers' encode_prompt and AUTOMATIC1111's weighting, on a small random text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_texts import encode_texts
from fuzz_tokenizer import clip_files, reference_tokenizer
from sd_runtime.errors import NumericalError, UsageError
from sd_runtime.prompt import Tokenizer
from sd_runtime.prompt.chunks import tokenize_prompt
from sd_runtime.prompt.weights import parse_weights
from sd_runtime.tensor import Array, Dim, TensorSpec

LONG = "a red fox, a blue bird, a green tree, " * 12
PLAIN = ["a photo of a cat", "", "naïve café <|endoftext|> !!", "a (very) [odd] prompt: BREAK 1.5)"]


class TorchTextEncoder:
    """A transformers text encoder as an Engine of at most 3 rows a call; keeps what it was asked for."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[list[int]] = []
        self.inputs = (TensorSpec("input_ids", "int64", (Dim("batch", 1, 2, 3), 77)),)
        self.outputs = (TensorSpec("last_hidden_state", "float32", (Dim("batch", 1, 2, 3), 77, 32)),)

    def place(self, name: str, array: Array) -> Array:
        return array

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        self.inputs[0].check(feeds["input_ids"])
        self.rows += feeds["input_ids"].tolist()
        with torch.no_grad():
            return {"last_hidden_state": self.model(torch.from_numpy(feeds["input_ids"]))[0].numpy()}

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = CLIPTextModel(config).eval()
    norm = model.text_model.final_layer_norm if hasattr(model, "text_model") else model.final_layer_norm
    torch.nn.init.normal_(norm.bias, mean=-0.1)  # untrained, the mean that weighting restores would be 0
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(clip_files())


@pytest.fixture(scope="module")
def diffusers_pipeline(model: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    missing = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(
        **missing, text_encoder=model, tokenizer=reference_tokenizer(clip_files()), requires_safety_checker=False
    )


def diffusers_encode(
    pipeline: Any, prompts: Sequence[str], negatives: Sequence[str] | None
) -> tuple[Array, Array | None]:
    positive, negative = pipeline.encode_prompt(
        list(prompts), "cpu", 1, negatives is not None, None if negatives is None else list(negatives)
    )
    return positive.detach().numpy(), None if negative is None else negative.detach().numpy()


def close(ours: Array | None, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)  # rows of one batch may be summed in another order


def test_plain_prompts_equal_diffusers(model: Any, tokenizer: Tokenizer, diffusers_pipeline: Any) -> None:
    negatives = ["", "ugly, blurry", "", "!"]
    ours = encode_texts(TorchTextEncoder(model), tokenizer, PLAIN, negatives, weighting=False)
    positive, negative = diffusers_encode(diffusers_pipeline, PLAIN, negatives)
    close(ours.positive, positive)
    close(ours.negative, negative)
    assert ours.truncated == ("",) * 4


def test_one_plain_prompt_is_bit_equal(model: Any, tokenizer: Tokenizer, diffusers_pipeline: Any) -> None:
    ours = encode_texts(TorchTextEncoder(model), tokenizer, PLAIN[:1])
    assert (ours.positive == diffusers_encode(diffusers_pipeline, PLAIN[:1], None)[0]).all()
    assert ours.negative is None and ours.negative_truncated == ()


def test_truncation_equals_diffusers(model: Any, tokenizer: Tokenizer, diffusers_pipeline: Any) -> None:
    prompts, negatives = [LONG, "a cat"], ["a dog", LONG]
    ours = encode_texts(TorchTextEncoder(model), tokenizer, prompts, negatives, weighting=False, truncate=True)
    positive, negative = diffusers_encode(diffusers_pipeline, prompts, negatives)
    close(ours.positive, positive)
    close(ours.negative, negative)
    assert ours.truncated[0] == ours.negative_truncated[1]
    assert ours.truncated[0].endswith("a green tree ,") and ours.truncated[1] == ours.negative_truncated[0] == ""


def test_lost_words_are_those_diffusers_names(tokenizer: Tokenizer, diffusers_pipeline: Any) -> None:
    reference = diffusers_pipeline.tokenizer
    lost = reference.decode(reference(LONG).input_ids[76:-1])
    assert tokenize_prompt(tokenizer, [(LONG, 1.0)], truncate=True).truncated == lost


def automatic1111(model: Any, tokenizer: Tokenizer, prompt: str) -> Array:
    """(77·chunks, D): each chunk encoded apart, scaled token by token, then back to the mean it had."""
    parts = []
    for chunk in tokenize_prompt(tokenizer, parse_weights(prompt), truncate=False).chunks:
        with torch.no_grad():
            hidden = model(torch.tensor([chunk.ids])).last_hidden_state
        scaled = hidden * torch.tensor(chunk.weights)[None, :, None]
        parts.append(scaled * (hidden.mean() / scaled.mean()))
    return torch.hstack(parts)[0].numpy()


@pytest.mark.parametrize(
    "prompt",
    [
        "a (red:1.3) fox in [deep] ((snow))",
        "a (red:1.3) fox BREAK in deep snow",
        f"(masterpiece:1.2), {LONG} (sharp:0.7)",
        r"a \(literal\) bracket",
        "(everything:0)",
        "a (sad:-0.5) clown",
    ],
)
def test_weights_equal_automatic1111(model: Any, tokenizer: Tokenizer, prompt: str) -> None:
    ours = encode_texts(TorchTextEncoder(model), tokenizer, [prompt])
    np.testing.assert_allclose(ours.positive[0], automatic1111(model, tokenizer, prompt), rtol=0, atol=1e-5)


def test_all_prompts_get_as_many_chunks(model: Any, tokenizer: Tokenizer, diffusers_pipeline: Any) -> None:
    ours = encode_texts(TorchTextEncoder(model), tokenizer, ["a cat", "a dog"], ["", LONG])
    count = len(tokenize_prompt(tokenizer, parse_weights(LONG), truncate=False).chunks)
    assert count > 1 and ours.positive.shape == (2, 77 * count, 32)
    assert ours.negative is not None and ours.negative.shape == ours.positive.shape
    (empty,), _ = diffusers_encode(diffusers_pipeline, [""], None)
    close(ours.positive[0], np.concatenate([automatic1111(model, tokenizer, "a cat"), *[empty] * (count - 1)]))
    close(ours.negative[1], automatic1111(model, tokenizer, LONG))


def test_each_chunk_is_encoded_once(model: Any, tokenizer: Tokenizer) -> None:
    engine = TorchTextEncoder(model)
    prompts = ["a cat", "a (cat:1.3)", "a cat BREAK a dog", "a dog"]
    ours = encode_texts(engine, tokenizer, prompts, ["", "", "", "a cat"])
    assert len(engine.rows) == 3  # "a cat", "a dog" and ""
    assert (ours.positive[0, :77] == ours.positive[2, :77]).all()
    assert ours.negative is not None and (ours.negative[3] == ours.positive[0]).all()


def test_rows_of_a_batch(model: Any, tokenizer: Tokenizer) -> None:
    guided = encode_texts(TorchTextEncoder(model), tokenizer, ["a", "b"], ["c", "d"])
    assert guided.negative is not None
    assert (guided.rows([1, 0, 0]) == np.concatenate([guided.negative[[1, 0, 0]], guided.positive[[1, 0, 0]]])).all()
    plain = encode_texts(TorchTextEncoder(model), tokenizer, ["a", "b"])
    assert (plain.rows([1]) == plain.positive[1:]).all()


class Broken(TorchTextEncoder):
    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        return {"last_hidden_state": np.full((len(feeds["input_ids"]), 77, 32), np.nan, np.float32)}


def test_overflow_is_an_error(model: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(NumericalError, match="text encoder: got NaN or infinity"):
        encode_texts(Broken(model), tokenizer, ["a"])


class Constant(TorchTextEncoder):
    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        return {"last_hidden_state": np.ones((len(feeds["input_ids"]), 77, 32), np.float32)}


def test_weights_that_cancel_out(model: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(NumericalError, match="cancel"):
        encode_texts(Constant(model), tokenizer, ["(cat:-76)"])


def test_negative_prompt_is_named(model: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"^negative_prompt: got U\+DC00"):
        encode_texts(TorchTextEncoder(model), tokenizer, ["a"], ["\udc00"])


@pytest.mark.parametrize(("size", "got"), [(100_001, "100001 characters"), (100_000, "20000 tokens in 267 chunks")])
def test_prompt_too_long(model: Any, tokenizer: Tokenizer, size: int, got: str) -> None:
    with pytest.raises(UsageError, match=rf"^prompt: got {got}, accepted at most "):
        encode_texts(TorchTextEncoder(model), tokenizer, ["bird " * (size // 5) + "x" * (size % 5)], most_chunks=16)


def test_exported_text_encoder(demo_bundle: Path) -> None:
    """The same from a bundle's graph: encode_prompts is handed what the exporter made."""
    from diffusers import StableDiffusionPipeline
    from sd_runtime import Pipeline

    checkpoint = Path(__file__).parents[2] / "export/sd_export/demo_checkpoint"
    reference = StableDiffusionPipeline.from_pretrained(checkpoint).to(torch.float32)
    prompts, negatives = ["a red star on a blue background"], ["a green circle"]
    with Pipeline.load(demo_bundle, device="cpu") as pipeline:
        ours = encode_texts(pipeline.engines.engine("text_encoder"), pipeline.tokenizer, prompts, negatives)
    positive, negative = diffusers_encode(reference, prompts, negatives)
    np.testing.assert_allclose(ours.positive, positive, rtol=0, atol=1e-5 * np.abs(positive).max())
    np.testing.assert_allclose(ours.negative, negative, rtol=0, atol=1e-5 * np.abs(positive).max())
