"""What a picture says about itself is read back exactly, and other programs' texts are understood."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_runtime.errors import UsageError
from sd_runtime.images import metadata
from sd_runtime.images.files import FileTakenError
from sd_runtime.images.metadata import (
    Parameters,
    format_parameters,
    parse_parameters,
    png_bytes,
    read_parameters,
    save_numbered_png,
    save_png,
)

RELAXED = settings(deadline=None)  # a slow disk is no failure

PICTURE = Image.new("RGB", (8, 8), "navy")

OURS = Parameters(
    prompt="a large red star, on a blue background",
    negative_prompt="blurry",
    num_inference_steps=20,
    scheduler="DPM++ 2M Karras",
    guidance_scale=7.5,
    seed=0,
    width=512,
    height=768,
    model="demo",
    model_hash="0123456789",
    rng="cpu",
    version="sd-lean 0.1.0",
    extra={"Denoising strength": "0.75"},
)

NO_SURROGATES = st.characters(exclude_categories=["Cs"])
TEXT = st.text(NO_SURROGATES, max_size=60)
AMBIGUOUS = ("Negative prompt: x", "Negative prompt:", "Steps: 20, Sampler: Euler, Seed: 1, Size: 8x8", "\r")
ODD = ("", " ", "\x00", '"', '\\"', "a: b, cc: dd, ee: ff", '\\u0000"}', "Seed: 4", "<!--", "]]>", "日本語", "😀")


def lines(*known):
    return st.lists(st.one_of(TEXT, st.sampled_from(known)), max_size=5).map("\n".join)


KEY = st.from_regex(r"\A[A-Za-z][A-Za-z0-9 \-/]{0,20}[a-z]\Z").filter(lambda key: key not in metadata._OWN_KEYS)


def optional(strategy):
    return st.none() | strategy


PARAMETERS = st.builds(
    lambda size, **rest: Parameters(width=size and size[0], height=size and size[1], **rest),
    size=optional(st.tuples(st.integers(1, 10_000), st.integers(1, 10_000))),
    prompt=lines(*ODD, *AMBIGUOUS),
    negative_prompt=lines(*ODD, *AMBIGUOUS),
    num_inference_steps=optional(st.integers(1, 1000)),
    scheduler=optional(TEXT),
    guidance_scale=optional(st.floats(allow_nan=False, allow_infinity=False)),
    seed=optional(st.integers(-(2**63), 2**64 - 1)),
    model=optional(TEXT),
    model_hash=optional(TEXT),
    rng=st.sampled_from([None, "cpu", "cuda"]),
    version=optional(TEXT),
    extra=st.dictionaries(KEY, TEXT, max_size=3),
)


# ---- round trips -----------------------------------------------------------------------------------------------------


@RELAXED
@given(PARAMETERS)
@example(Parameters(prompt="Steps: 1, Sampler: x, Seed: 2", negative_prompt="Negative prompt: y\nSteps: 3"))
@example(Parameters(prompt="\r\n\n", negative_prompt="\n"))
def test_fault_37_our_pictures_give_back_what_was_written(tmp_path_factory, parameters):
    path = tmp_path_factory.getbasetemp() / "round-trip.png"
    assert read_parameters(save_png(PICTURE, path, parameters=parameters, overwrite=True)) == parameters


def full(parameters):
    """With the numbers known: a last line of fewer than three settings would not be recognised."""
    return dataclasses.replace(parameters, num_inference_steps=20, seed=1, width=8, height=8, guidance_scale=7.25)


def unambiguous(text):
    return not re.search(r"\r|^Negative prompt:|^Steps:", text, re.MULTILINE)


@RELAXED
@given(PARAMETERS.map(full), lines(*ODD).filter(unambiguous), lines(*ODD).filter(unambiguous))
def test_the_text_alone_gives_back_all_but_ambiguous_prompts(parameters, prompt, negative_prompt):
    parameters = dataclasses.replace(parameters, prompt=prompt, negative_prompt=negative_prompt)
    read = parse_parameters(format_parameters(parameters))
    assert read == parameters


@RELAXED
@given(lines(*ODD, *AMBIGUOUS))
def test_any_text_is_understood_somehow(text):
    assert isinstance(parse_parameters(text), Parameters)


@RELAXED
@given(
    st.from_regex(r"\A(Steps|Seed|Size|CFG scale|RNG|Model|\w ?): ?.{0,12}(, (Steps|Sampler|Size|a b): ?.{0,20}){3}\Z")
)
@example('Steps: 20, Sampler: "\\ud800", Seed: 1, Size: 1x1')
@example("Steps: 20, CFG scale: 1e999, Seed: 99999999999999999999999999, Size: 1x")
def test_any_line_of_settings_is_understood_somehow(text):
    assert isinstance(parse_parameters(text), Parameters)


def test_the_text_follows_the_documented_format():
    assert format_parameters(OURS) == (
        "a large red star, on a blue background\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 0, Size: 512x768, Model hash: 0123456789, "
        "Model: demo, Denoising strength: 0.75, RNG: CPU, Version: sd-lean 0.1.0"
    )
    whole = dataclasses.replace(OURS, negative_prompt="", guidance_scale=7.0, model='a, "b": c\nd', rng="cuda")
    *prompt, last = format_parameters(whole).split("\n")
    assert prompt == [whole.prompt], "no line for an empty negative prompt"
    assert 'CFG scale: 7, Seed: 0, Size: 512x768, Model hash: 0123456789, Model: "a, \\"b\\": c\\nd"' in last
    assert "RNG: NV" in last


# AUTOMATIC1111's own reader, by its documented grammar: pairs on the last line, values JSON-quoted where needed.
A1111_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@RELAXED
@given(PARAMETERS.map(full))
def test_other_readers_find_our_settings(parameters):
    last = format_parameters(parameters).split("\n")[-1]
    pairs = {key: json.loads(value) if value.startswith('"') else value for key, value in A1111_PAIR.findall(last)}
    assert pairs["Steps"] == "20"
    assert pairs["Size"] == "8x8"
    for key, value in {**parameters.extra, "Sampler": parameters.scheduler, "Model": parameters.model}.items():
        assert pairs.get(key) == value


# ---- other programs' texts -------------------------------------------------------------------------------------------

A1111_CLASSIC = """girl with an artist's beret, determined, ((eyeshadow)), (coquettish:1.2), detailed
second line of the prompt
Negative prompt: ugly, (((deformed))), [blurry], bad anatomy
and its second line
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b"""

A1111_NEW = (
    "a lighthouse <lora:stormy:0.8>\n"
    "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 18446744073709551615, Size: 640x960, "
    "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.7, Clip skip: 2, Hires upscale: 2, "
    'Lora hashes: "stormy: 1a2b3c4d5e6f", RNG: CPU, TI hashes: "easynegative: c74b4e810b03, badhand: 14ab1d0f9e2c", '
    "Version: v1.10.1"
)

DYNAMIC_PROMPTS = (
    "a red cat\nSteps: 20, Sampler: Euler, CFG scale: 7.0, Seed: 3, Size: 64x64\n"
    "Template: a {red|blue} cat\nNegative Template: x"
)


def test_classic_text():
    read = parse_parameters(A1111_CLASSIC)
    assert read.prompt.split("\n") == A1111_CLASSIC.split("\n")[:2]
    assert read.negative_prompt == "ugly, (((deformed))), [blurry], bad anatomy\nand its second line"
    assert (read.num_inference_steps, read.scheduler, read.guidance_scale) == (20, "Euler a", 7.0)
    assert (read.seed, read.width, read.height, read.model_hash) == (965400086, 512, 512, "45dee52b")
    assert read.model is read.version is read.rng is None
    assert read.extra == {}


def test_new_text():
    read = parse_parameters(A1111_NEW)
    assert (read.prompt, read.negative_prompt) == ("a lighthouse <lora:stormy:0.8>", "")
    assert (read.scheduler, read.seed, read.rng) == ("DPM++ 2M Karras", 2**64 - 1, "cpu")
    assert (read.model, read.version, read.guidance_scale) == ("v1-5-pruned-emaonly", "v1.10.1", 6.5)
    assert read.extra["Lora hashes"] == "stormy: 1a2b3c4d5e6f"
    assert read.extra["TI hashes"] == "easynegative: c74b4e810b03, badhand: 14ab1d0f9e2c"
    assert read.extra["Clip skip"] == "2"
    assert "Schedule type" not in read.extra


def test_lines_that_extensions_append_are_no_prompt():
    read = parse_parameters(DYNAMIC_PROMPTS)
    assert (read.prompt, read.seed) == ("a red cat", 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("Steps: 20, Sampler: Euler, Schedule type: Automatic, Seed: 1", {"scheduler": "Euler"}),
        ("Steps: 20, Sampler: Euler, Schedule type: SGM Uniform, Seed: 1", {"extra": {"Schedule type": "SGM Uniform"}}),
        ("Steps: many, Sampler: Euler, Seed: 1", {"num_inference_steps": None, "extra": {"other Steps": "many"}}),
        ("Steps: 20, Sampler: Euler, Seed: -5", {"seed": -5}),
        ("Steps: 20, CFG scale: nan, Seed: 5", {"guidance_scale": None, "extra": {"other CFG scale": "nan"}}),
        ("Steps: 20, Size: 512x, RNG: NV", {"width": None, "rng": "cuda", "extra": {"other Size": "512x"}}),
        ("Steps: 20, Model: , Seed: 5", {"model": ""}),
        ('Steps: 20, Model: "unfinished, Seed: 5', {"model": '"unfinished', "seed": 5}),
        ("Steps: 20, loose words, Seed: 5, Size: 8x8", {"seed": 5, "width": 8}),
        ("  Steps:20,Sampler:Euler a,Seed:5  ", {"scheduler": "Euler a", "seed": 5}),
    ],
)
def test_odd_settings(settings, expected):
    read = parse_parameters(f"a prompt\r\n{settings}\r\n")
    assert read.prompt == "a prompt"
    for name, value in expected.items():
        assert getattr(read, name) == value, name


def test_a_text_without_settings_is_a_prompt():
    assert parse_parameters("a cat, sitting\nNegative prompt: dogs") == Parameters("a cat, sitting", "dogs")
    assert parse_parameters("") == Parameters("")


@pytest.mark.parametrize(
    "unit", ["a", " ", ",", "aa:", 'aa:"', 'aa:"\\', "aa: ", '"', "a b", "Steps:", "Steps:\n", ", ", "é"]
)
def test_reading_hostile_text_takes_linear_time(unit):
    started = time.perf_counter()
    parse_parameters("Steps: 1, Size: " + unit * (300_000 // len(unit)))
    parse_parameters(unit * (300_000 // len(unit)) + "\n")
    assert time.perf_counter() - started < 5


# ---- what other tools do to our pictures -----------------------------------------------------------------------------


def with_chunks(tmp_path, **chunks):
    info = PngInfo()
    for key, value in chunks.items():
        info.add_text(key, value)
    PICTURE.save(tmp_path / "other.png", pnginfo=info)
    return tmp_path / "other.png"


def test_a_tool_that_rewrites_the_text_alone_is_believed(tmp_path):
    text = format_parameters(dataclasses.replace(OURS, seed=99))
    with Image.open(save_png(PICTURE, tmp_path / "ours.png", parameters=OURS)) as image:
        document = image.info["sd_runtime"]
    assert read_parameters(with_chunks(tmp_path, parameters=text, sd_runtime=document)).seed == 99


@pytest.mark.parametrize(
    "document", ["", "{", "[]", '{"prompt": "x", "novelty": 1}', '{"prompt": 5}', "null", "é" * 99]
)
def test_a_document_that_is_not_understood_leaves_the_text(tmp_path, document):
    path = with_chunks(tmp_path, parameters=format_parameters(OURS), sd_runtime=document)
    assert read_parameters(path) == OURS


def test_pictures_without_parameters_and_other_files_are_usage_errors(tmp_path):
    PICTURE.save(tmp_path / "bare.png")
    PICTURE.save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("bare.png", "photo.jpg", "text.png", "missing.png"):
        with pytest.raises(UsageError, match=r"picture: got .*accepted a"):
            read_parameters(tmp_path / name)


def test_a_text_bomb_is_a_usage_error(tmp_path):
    info = PngInfo()
    info.add_text("parameters", "x" * (64 << 20), zip=True)
    PICTURE.save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(UsageError):
        read_parameters(tmp_path / "bomb.png")


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_a_png_with_the_same_pixels_and_the_mark_of_ai_made_media(tmp_path):
    path = save_png(PICTURE, tmp_path / "a.png", parameters=OURS)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.tobytes() == PICTURE.tobytes()
        assert image.info["parameters"] == format_parameters(OURS)
        packet = image.info["XML:com.adobe.xmp"]
    (description,) = ElementTree.fromstring(packet.strip("\ufeff")).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    source = description.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"]
    assert source == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def test_without_parameters_only_the_mark_is_written(tmp_path):
    with Image.open(save_png(PICTURE, tmp_path / "a.png")) as image:
        assert "XML:com.adobe.xmp" in image.info
        assert not {"parameters", "sd_runtime"} & set(image.info)


def test_the_same_picture_gives_the_same_bytes():
    assert png_bytes(PICTURE, OURS) == png_bytes(PICTURE.copy(), OURS)


def test_saving_never_replaces_unasked_and_numbers_go_on(tmp_path):
    path = save_png(PICTURE, tmp_path / "a.png")
    with pytest.raises(FileTakenError):
        save_png(PICTURE, path)
    save_png(PICTURE, path, overwrite=True)
    names = [save_numbered_png(PICTURE, tmp_path, parameters=OURS).name for _ in range(3)]
    assert names == ["picture-0001.png", "picture-0002.png", "picture-0003.png"]


def test_a_number_that_another_process_took_meanwhile_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "picture-0001.png").touch()
    monkeypatch.setattr(metadata, "free_names", lambda folder: iter([folder / f"picture-000{i}.png" for i in (1, 2)]))
    assert save_numbered_png(PICTURE, tmp_path).name == "picture-0002.png"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "\ud800"},
        {"negative_prompt": "a\udfff"},
        {"model": "\ud800"},
        {"guidance_scale": math.nan},
        {"guidance_scale": math.inf},
        {"width": None},
        {"extra": {"Seed": "1"}},
        {"extra": {"a:b": "1"}},
        {"extra": {"a\nb": "1"}},
        {"extra": {"": "1"}},
    ],
)
def test_what_cannot_be_written_is_refused(bad):
    with pytest.raises(UsageError):
        dataclasses.replace(OURS, **bad)
