"""Textual inversion against diffusers' load_textual_inversion and encode_prompt."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_texts import encode_texts
from fuzz_tokenizer import clip_files, reference_tokenizer
from safetensors.torch import save_file
from sd_runtime import Pipeline
from sd_runtime.adapters.textual_inversion import load_textual_inversion
from sd_runtime.bundle.safetensors_file import open_safetensors
from sd_runtime.errors import BundleError, UsageError
from sd_runtime.prompt import TokenEmbeddings, Tokenizer
from sd_runtime.prompt.chunks import empty_chunk
from sd_runtime.tensor import Array, Dim, TensorSpec

CHECKPOINT = Path(__file__).parents[2] / "export/sd_export/demo_checkpoint"
WIDTH = 64
TABLE = "text_model.embeddings.token_embedding.weight"


class EmbedsTextEncoder:
    """A transformers text encoder as the engine of its form "embeds": embeddings in, the look-up left out."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inputs = (TensorSpec("inputs_embeds", "float32", (Dim("batch", 1, 2, 4), 77, WIDTH)),)
        self.outputs = (TensorSpec("last_hidden_state", "float32", (Dim("batch", 1, 2, 4), 77, WIDTH)),)

    def place(self, name: str, array: Array) -> Array:
        return array

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        embeds = feeds["inputs_embeds"]
        self.inputs[0].check(embeds)
        ids = torch.zeros(embeds.shape[:2], dtype=torch.int64)
        hook = self.model.get_input_embeddings().register_forward_hook(lambda *_: torch.from_numpy(embeds))
        try:
            with torch.no_grad():
                return {"last_hidden_state": self.model(ids).last_hidden_state.numpy()}
        finally:
            hook.remove()

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(CHECKPOINT / "text_encoder").float().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(CHECKPOINT / "tokenizer")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A word of one vector and one of three as diffusers saves them, and one of two as AUTOMATIC1111 does."""
    torch.manual_seed(1)
    saved = {
        "toy": {"<cat-toy>": torch.randn(1, WIDTH)},
        "flat": {"<Flat>": torch.randn(WIDTH).half()},
        "style": {"<my style>": torch.randn(3, WIDTH)},
        "negative": {"emb_params": torch.randn(2, WIDTH).bfloat16()},
    }
    for name, tensors in saved.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in saved}


def table_of(model: Any) -> Array:
    table: Array = model.get_input_embeddings().weight.detach().numpy()
    return table


def diffusers_encode(model: Any, files: Sequence[Path], tokens: Sequence[str | None], prompts: Sequence[str]) -> Array:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    missing = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        **missing,
        text_encoder=copy.deepcopy(model),
        tokenizer=CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer"),
        requires_safety_checker=False,
    )
    for file, token in zip(files, tokens, strict=True):
        pipeline.load_textual_inversion(str(file), token=token)
    positive: Array = pipeline.encode_prompt(list(prompts), "cpu", 1, False)[0].detach().numpy()
    return positive


PROMPTS = [
    "a photo of <cat-toy> on a blue background",
    "a <CAT-TOY>, <flat>s; a circle in <my style>",
    "negative <my style> and again <my style>!",
    "a plain red star",
]


def test_equals_diffusers(model: Any, tokenizer: Tokenizer, files: dict[str, Path]) -> None:
    order = [files[name] for name in ("toy", "style", "flat", "negative")]
    words = dict(load_textual_inversion(path) for path in order)
    assert {word: len(vectors) for word, vectors in words.items()} == {
        "<cat-toy>": 1, "<my style>": 3, "<Flat>": 1, "negative": 2,
    }  # fmt: skip
    embeddings = TokenEmbeddings(table_of(model), words)
    ours = encode_texts(EmbedsTextEncoder(model), tokenizer, PROMPTS, weighting=False, embeddings=embeddings)
    theirs = diffusers_encode(model, order, [None, None, None, "negative"], PROMPTS)
    np.testing.assert_allclose(ours.positive, theirs, rtol=0, atol=5e-6)


def test_word_can_be_renamed(files: dict[str, Path]) -> None:
    assert load_textual_inversion(files["toy"], "<other>")[0] == "<other>"
    assert load_textual_inversion(files["negative"], "bad")[0] == "bad"


def test_weights_and_words(model: Any, tokenizer: Tokenizer, files: dict[str, Path]) -> None:
    """A weighted word weighs all of its vectors; without learnt words in it, a prompt is as ever."""
    words = dict([load_textual_inversion(files["style"])])
    embeddings = TokenEmbeddings(table_of(model), words)
    engine = EmbedsTextEncoder(model)
    plain = encode_texts(engine, tokenizer, ["a <my style>"], embeddings=embeddings).positive[0]
    weighted = encode_texts(engine, tokenizer, ["a (<my style>:2)"], embeddings=embeddings).positive[0]
    ratio = weighted / plain  # of every token: its weight, times what restores the mean
    np.testing.assert_allclose(ratio[2:5] / ratio[:1], 2.0, rtol=1e-4)
    np.testing.assert_allclose(ratio[5:] / ratio[:1], 1.0, rtol=1e-4)


def test_words_are_found_whole(tokenizer: Tokenizer) -> None:
    words = tokenizer.with_words({"sks": 700, "<x>": 701, "sks dog": 702})
    assert [700 in words.encode(text) for text in ("a SKS", "asks", "sksy", "(sks:1)", "sks, x")] == [1, 0, 0, 1, 1]
    assert [701 in words.encode(text) for text in ("a<x>b", "<X>", "< x>")] == [1, 1, 0]
    assert words.encode("Sks  Dog") == [702]
    assert words.decode(words.encode("a SKS dog")) == "a sks dog"
    assert tokenizer.encode("sks") != [700]


def test_exported_text_encoder(demo_bundle: Path, tokenizer: Tokenizer, files: dict[str, Path]) -> None:
    """The graph and the table of embeddings as a bundle has them."""
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(CHECKPOINT / "text_encoder").float().eval()
    words = dict(load_textual_inversion(files[name]) for name in ("toy", "style"))
    table = open_safetensors(demo_bundle / "text_encoder/model.safetensors")[TABLE]
    with Pipeline.load(demo_bundle, device="cpu") as pipeline:
        engine = pipeline.engines.engine("text_encoder", "embeds")
        ours = encode_texts(engine, tokenizer, PROMPTS[:1], embeddings=TokenEmbeddings(table, words))
        plain = encode_texts(engine, tokenizer, PROMPTS[3:], embeddings=TokenEmbeddings(table, {}))
        same = encode_texts(pipeline.engines.engine("text_encoder"), tokenizer, PROMPTS[3:])
    theirs = diffusers_encode(model, [files["toy"], files["style"]], [None, None], PROMPTS[:1])
    np.testing.assert_allclose(ours.positive, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert (plain.positive == same.positive).all()


def test_rows_of_the_table(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    table, learnt = rng.normal(size=(602, 4)).astype(np.float16), rng.normal(size=(3, 4)).astype(np.float32)
    embeddings = TokenEmbeddings(table, {"<a>": learnt[:2], "<b>": learnt[2:]})
    assert embeddings.ids == {"<a>": 602, "<b>": 604} and embeddings.vectors == {602: 2, 604: 1}
    ids = np.array([[0, 601, 602, 603, 604]])
    expected = np.concatenate([table[[0, 601]].astype(np.float32), learnt])[None]
    assert embeddings.look_up(ids).dtype == np.float32
    assert (embeddings.look_up(ids) == expected).all()
    row = np.array([empty_chunk(tokenizer).ids])
    assert (TokenEmbeddings(table, {}).look_up(row)[0] == table[row[0]]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"<a>": (1, 5)}, r"textual inversion '<a>': got \(1, 5\), accepted \(1\.\.75, 4\)"),
        ({"<a>": (76, 4)}, r"got \(76, 4\)"),
        ({"<a>": (0, 4)}, r"got \(0, 4\)"),
        ({" \t": (1, 4)}, "not blank"),
        ({"<a>": (1, 4), "<A>": (1, 4)}, "differ, ignoring case"),
    ],
)
def test_words_that_do_not_fit(words: dict[str, tuple[int, int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenEmbeddings(np.zeros((602, 4), np.float32), {word: np.zeros(shape) for word, shape in words.items()})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(1, 4), "b": torch.ones(1, 4)}, "tensors: got a, b, accepted one"),
        ({"clip_g": torch.ones(1, 4), "clip_l": torch.ones(1, 4)}, "SDXL"),
        ({"a": torch.ones(2, 4, dtype=torch.int32)}, r"a: got int32\(2, 4\)"),
        ({"a": torch.ones(2, 3, 4)}, r"a: got float32\(2, 3, 4\)"),
        ({"a": torch.tensor(1.0)}, "a: got float32"),
        ({"a": torch.full((1, 4), torch.nan)}, "a: got NaN or infinity"),
    ],
)
def test_files_of_other_forms(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=message):
        load_textual_inversion(tmp_path / "x.safetensors")


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"textual inversion: got .*, accepted a \.safetensors file; convert"):
        load_textual_inversion(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.safetensors", "there is no such file"),
        ("x" * 300 + ".safetensors", "the name is too long"),
        ("file/x.safetensors", "there is no such file"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=rf"^textual inversion: got .*, accepted a .safetensors file; {reason}$"):
        load_textual_inversion(tmp_path / name)


def test_a_folder_and_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "x.safetensors"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"it is a folder$"):
        load_textual_inversion(folder)

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UsageError, match=r"you may not look into its folder$"):
        load_textual_inversion(folder)


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(BundleError, match=r"x\.safetensors: header"):
        load_textual_inversion(tmp_path / "x.safetensors")


def test_words_equal_added_tokens_of_transformers() -> None:
    reference = reference_tokenizer(clip_files())
    reference.add_tokens(["<cat-toy>", "<my style>"])
    ours = Tokenizer.from_bytes(clip_files()).with_words({"<cat-toy>": 49408, "<my style>": 49409})
    for text in ("a <cat-toy>!", "<CAT-toy><my  Style>s", "<|endoftext|><my style>", "<my\tstyle> <my-style>"):
        assert ours.encode(text) == reference(text, add_special_tokens=False).input_ids
