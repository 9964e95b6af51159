"""Pictures of other programs: what they say is drawn as what it means, or named, and never drawn as a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_runtime import Pipeline, UsageError
from sd_runtime.cli.recall import recall
from sd_runtime.cli.run import main
from sd_runtime.images.foreign import read_comfy, read_document
from sd_runtime.images.metadata import Parameters, _from_told, read_parameters
from sd_runtime.images.texts import decode_comment

PICTURE = Image.new("RGB", (8, 8), "navy")

SWARM: dict[str, Any] = {
    "sui_image_params": {
        "prompt": "a lighthouse at dusk, (storm:1.2) <lora:waves:0.8>",
        "negativeprompt": "people",
        "model": "SD15/v1-5-pruned-emaonly.safetensors",
        "seed": 18446744073709551615,
        "steps": 25,
        "cfgscale": 6.5,
        "aspectratio": "1:1",
        "width": 64,
        "height": 72,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "clipstopatlayer": -2,
        "loras": ["waves"],
        "swarm_version": "0.9.6.2",
        "date": "2026-03-14",
        "generation_time": "0.02 (prep) and 3.10 (gen) seconds",
    },
    "sui_models": [{"name": "SD15/v1-5-pruned-emaonly.safetensors", "param": "model", "hash": "0x00"}],
}

FOOOCUS: dict[str, Any] = {
    "adm_guidance": "(1.5, 0.8, 0.3)",
    "base_model": "realisticVision",
    "base_model_hash": "6ce0161689",
    "full_negative_prompt": ["people", "blurry"],
    "full_prompt": ["cinematic still a [red] lighthouse", "film grain"],
    "guidance_scale": 4,
    "loras": [],
    "metadata_scheme": "fooocus",
    "negative_prompt": "people",
    "performance": "Speed",
    "prompt": "a [red] lighthouse",
    "prompt_expansion": "",
    "refiner_model": "None",
    "refiner_switch": 0.5,
    "resolution": "(64, 72)",
    "sampler": "dpmpp_2m_sde_gpu",
    "scheduler": "karras",
    "seed": "123",
    "sharpness": 2,
    "steps": 30,
    "styles": "['Fooocus Cinematic']",
    "vae": "Default (model)",
    "version": "Fooocus v2.5.5",
}

FOOOCUS_A1111 = """cinematic still a red lighthouse, film grain
Negative prompt: people, blurry
Steps: 30, Sampler: DPM++ 2M SDE Karras, Seed: 123, Size: 64x72, CFG scale: 4, Sharpness: 2, \
ADM Guidance: "(1.5, 0.8, 0.3)", Model: realisticVision, Model hash: 6ce0161689, Performance: Speed, \
Scheduler: karras, VAE: Default (model), Raw prompt: a red lighthouse, Raw negative prompt: people, \
Version: Fooocus v2.5.5"""

COMFY: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "euler_ancestral", "scheduler": "normal",
            "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "SD15\\v1-5-pruned-emaonly.ckpt"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 72, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a [red] lighthouse, (storm:1.2)", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "people", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}  # fmt: skip

A1111 = """a lighthouse <lora:waves:0.8>, é 日本
Negative prompt: people
Steps: 4, Sampler: Euler a, Schedule type: Karras, CFG scale: 6.5, Seed: 5, Size: 64x72, Version: v1.10.1"""


def png(path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for key, value in texts.items():
        chunks.add_text(key.replace("_dash_", "-"), value)
    PICTURE.save(path, pnginfo=chunks)
    return path


def with_exif(path: Path, tags: dict[int, Any], folder: dict[int, Any] | None = None) -> Path:
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    if folder:
        exif.get_ifd(0x8769).update(folder)
    PICTURE.save(path, exif=exif)
    return path


def comment(text: str, encoding: str = "utf-16-be", kind: bytes = b"UNICODE\0") -> bytes:
    return kind + text.encode(encoding)


# ---- what is mapped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
def test_swarmui(tmp_path: Path, indent: int | None) -> None:
    read = read_parameters(png(tmp_path / "a.png", parameters=json.dumps(SWARM, indent=indent)))
    assert read == Parameters(
        prompt="a lighthouse at dusk, (storm:1.2) <lora:waves:0.8>",
        negative_prompt="people",
        num_inference_steps=25,
        scheduler="dpmpp_2m Karras",
        guidance_scale=6.5,
        seed=2**64 - 1,
        width=64,
        height=72,
        model="v1-5-pruned-emaonly",
        rng="cpu",
        version="SwarmUI 0.9.6.2",
        extra={"clipstopatlayer": "-2", "loras": '["waves"]'},
    )
    settings, unknown = recall(read)
    assert settings.prompt == "a lighthouse at dusk, (storm:1.2)"
    assert settings.options["scheduler"] == "dpmpp_2m Karras"
    assert unknown == ["<lora:waves:0.8> (adds a LoRA)", "clipstopatlayer: -2", 'loras: ["waves"]']


def test_fooocus(tmp_path: Path) -> None:
    """What was drawn: with its styles, and square brackets as text."""
    read = read_parameters(png(tmp_path / "a.png", parameters=json.dumps(FOOOCUS), fooocus_scheme="fooocus"))
    assert read == Parameters(
        prompt=r"cinematic still a \[red\] lighthouse, film grain",
        negative_prompt="people, blurry",
        num_inference_steps=30,
        scheduler="dpmpp_2m_sde_gpu Karras",
        guidance_scale=4.0,
        seed=123,
        width=64,
        height=72,
        model="realisticVision",
        model_hash="6ce0161689",
        rng="cpu",
        version="Fooocus v2.5.5",
        extra={"adm_guidance": "(1.5, 0.8, 0.3)", "sharpness": "2"},
    )
    assert recall(read)[0].options["scheduler"] == "dpmpp_2m_sde_gpu Karras"


def test_fooocus_with_automatic1111s_text(tmp_path: Path) -> None:
    read = read_parameters(png(tmp_path / "a.png", parameters=FOOOCUS_A1111, fooocus_scheme="a1111"))
    assert (read.prompt, read.negative_prompt) == ("cinematic still a red lighthouse, film grain", "people, blurry")
    assert (read.scheduler, read.rng, read.seed, read.model) == ("DPM++ 2M SDE Karras", "cpu", 123, "realisticVision")
    assert read.extra == {"Sharpness": "2", "ADM Guidance": "(1.5, 0.8, 0.3)"}
    assert recall(read)[1] == ["Sharpness: 2", "ADM Guidance: (1.5, 0.8, 0.3)"]


def test_comfyui(tmp_path: Path) -> None:
    read = read_parameters(png(tmp_path / "a.png", prompt=json.dumps(COMFY), workflow="{}"))
    assert read == Parameters(
        prompt=r"a \[red\] lighthouse, (storm:1.2)",
        negative_prompt="people",
        num_inference_steps=20,
        scheduler="euler_ancestral",
        guidance_scale=8.0,
        seed=5,
        width=64,
        height=72,
        model="v1-5-pruned-emaonly",
        rng="cpu",
        version="ComfyUI",
    )
    webp = with_exif(tmp_path / "a.webp", {0x0110: f"prompt:{json.dumps(COMFY)}", 0x010F: "workflow:{}"})
    assert read_parameters(webp) == read
    other = {"prompt": COMFY, "workflow": {}}
    assert read_parameters(with_exif(tmp_path / "b.webp", {}, {0x9286: comment(json.dumps(other))})) == read


def changed(node: str, **inputs: Any) -> dict[str, Any]:
    return COMFY | {node: COMFY[node] | {"inputs": COMFY[node]["inputs"] | inputs}}


def test_comfyuis_other_nodes_are_named() -> None:
    lora = {"class_type": "LoraLoader", "inputs": {"lora_name": "x", "model": ["4", 0], "clip": ["4", 1]}}
    told = read_comfy(json.dumps(changed("3", model=["10", 0]) | {"10": lora}))
    assert told is not None
    assert (told.settings["Model"], told.settings["Nodes"]) == ("v1-5-pruned-emaonly", "LoraLoader")


@pytest.mark.parametrize(
    "graph",
    [
        {},
        changed("3", denoise=0.5),
        changed("3", seed=["11", 0]),
        changed("3", latent_image=["8", 0]),
        changed("3", positive=["7"]),
        changed("6", text=["12", 0]),
        changed("3", model=["3", 0]),
        changed("3", model=["404", 0]),
        COMFY | {"13": COMFY["3"]},
        COMFY | {"13": {"class_type": "KSamplerAdvanced", "inputs": {}}},
        COMFY | {"13": {"class_type": "SamplerCustom", "inputs": {}}},
    ],
)
def test_other_graphs_are_named(tmp_path: Path, graph: dict[str, Any]) -> None:
    path = png(tmp_path / "a.png", prompt=json.dumps(graph))
    accepted = "accepted one KSampler from an empty latent and texts$"
    with pytest.raises(UsageError, match=rf"^'.*a\.png': ComfyUI: got a graph of .*, {accepted}"):
        read_parameters(path)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize(
    "written",
    [
        comment(A1111),
        comment(A1111, "utf-16-le"),
        comment(A1111, "utf-8", b"\0" * 8),
        comment(A1111, "utf-8", b""),
    ],
    ids=["big", "little", "unsaid", "bare"],
)
def test_automatic1111s_exif(tmp_path: Path, suffix: str, written: bytes) -> None:
    read = read_parameters(with_exif(tmp_path / f"a.{suffix}", {}, {0x9286: written}))
    assert (read.prompt, read.negative_prompt) == ("a lighthouse <lora:waves:0.8>, é 日本", "people")
    assert (read.scheduler, read.seed, read.width, read.version) == ("Euler a Karras", 5, 64, "v1.10.1")


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_swarmui_and_fooocus_exif(tmp_path: Path, suffix: str) -> None:
    swarm = read_parameters(with_exif(tmp_path / f"a.{suffix}", {}, {0x9286: comment(json.dumps(SWARM), "utf-16-le")}))
    assert swarm == read_parameters(png(tmp_path / "a.png", parameters=json.dumps(SWARM)))
    tags = {0x9286: json.dumps(FOOOCUS), 0x0131: "Fooocus v2.5.5", 0x927C: "fooocus"}
    fooocus = read_parameters(with_exif(tmp_path / f"b.{suffix}", tags))
    assert fooocus == read_parameters(png(tmp_path / "b.png", parameters=json.dumps(FOOOCUS)))


@pytest.mark.parametrize(
    ("told", "scheduler", "unknown"),
    [
        ("Sampler: Euler a, Schedule type: Karras", "Euler a", ["Schedule type: Karras"]),
        ("Sampler: DDIM, Schedule type: Exponential", "DDIM", ["Schedule type: Exponential"]),
        ("Sampler: Euler, Schedule type: Karras", "Euler Karras", []),
        ("Sampler: Euler, Schedule type: Uniform", "Euler", []),
        ("Sampler: Euler, Schedule type: SGM Uniform", "Euler", ["Schedule type: SGM Uniform"]),
        ("Sampler: Euler a, Schedule type: Automatic", "Euler a", []),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "DPM++ 2M Karras", []),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "DPM++ 2M SDE Exponential", []),
        ("Sampler: DPM++ 2M", "DPM++ 2M", []),
        ("Sampler: Restart, Schedule type: Karras", None, ["Sampler: Restart Karras"]),
        ("Sampler: Karras", None, ["Sampler: Karras"]),
    ],
)
def test_no_sampler_is_lost_for_its_noise_levels(
    tmp_path: Path, told: str, scheduler: str | None, unknown: list[str]
) -> None:
    text = f"a cat\nSteps: 4, {told}, CFG scale: 7, Seed: 5, Size: 64x72"
    settings, rest = recall(read_parameters(png(tmp_path / "a.png", parameters=text)))
    assert (settings.options.get("scheduler"), rest) == (scheduler, unknown)


# ---- what is not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "program"),
    [
        ({"invokeai_metadata": '{"positive_prompt": "a cat"}'}, "InvokeAI"),
        ({"sd_dash_metadata": "{}"}, "InvokeAI"),
        ({"Dream": '"a cat" -s 50 -S 1'}, "InvokeAI"),
        ({"Software": "NovelAI", "Comment": '{"steps": 28}', "Description": "a cat"}, "NovelAI"),
        ({"workflow": "{}"}, "ComfyUI"),
        ({"prompt": "a cat", "seed": "3"}, "Easy Diffusion or another program that writes a text for each setting"),
    ],
)
def test_programs_that_are_not_read_are_named(tmp_path: Path, texts: dict[str, str], program: str) -> None:
    with pytest.raises(UsageError) as error:
        read_parameters(png(tmp_path / "a.png", **texts))
    assert error.value.what == "picture"
    assert str(error.value.got).endswith(f"a.png, with the metadata of {program}, which is not read")


@pytest.mark.parametrize("document", ["{}", '{"prompt": "a cat"}', '{"sui_image_params": 3}', '{"a": NaN}'])
def test_json_of_unknown_programs_is_no_prompt(tmp_path: Path, document: str) -> None:
    with pytest.raises(UsageError, match=r"a\.png': generation parameters: got \{.*accepted those of AUTOMATIC1111"):
        read_parameters(png(tmp_path / "a.png", parameters=document))


def test_a_prompt_that_looks_like_json_is_one(tmp_path: Path) -> None:
    text = "{red} cat\nSteps: 4, Sampler: Euler, Seed: 5, Size: 64x72"
    assert read_parameters(png(tmp_path / "a.png", parameters=text)).prompt == "{red} cat"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
KEYS = st.sampled_from([*SWARM["sui_image_params"], *FOOOCUS, "class_type", "inputs"])


@given(st.dictionaries(KEYS | st.text(max_size=4), JSON), st.sampled_from(["swarm", "fooocus", "comfy", "bare"]))
def test_any_document_is_read_or_refused(said: dict[str, Any], kind: str) -> None:
    inputs = [COMFY[node] | {"inputs": COMFY[node]["inputs"] | said} for node in ("3", "5")]
    document = {
        "swarm": {"sui_image_params": said},
        "fooocus": {"base_model": "x", "prompt": "a"} | said,
        "comfy": {"prompt": COMFY | dict(zip("35", inputs, strict=True))},
        "bare": said,
    }[kind]
    try:
        told = read_document(json.dumps(document))
    except UsageError:
        return
    assert told is not None
    recall(_from_told(told))


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda data: b"UNICODE\0" + data))
def test_any_exif_comment_is_text(data: bytes) -> None:
    decode_comment(data).encode()


def test_damaged_exif_says_nothing_or_something_else(tmp_path: Path) -> None:
    path = with_exif(tmp_path / "a.jpg", {}, {0x9286: comment(A1111)})
    data, refused = path.read_bytes(), 0
    at = data.index(b"Exif\0\0") + 6
    for offset in range(at, at + 60):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        try:
            read_parameters(path)
        except UsageError:
            refused += 1
    assert refused


# ---- drawn -----------------------------------------------------------------------------------------------------------


def test_what_is_mapped_is_drawn_and_the_rest_is_named(
    demo_bundle: Path,
    pipe: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, bundle, **options: pipe))
    monkeypatch.setattr(pipe, "close", lambda: None)
    png(Path("swarm.png"), parameters=json.dumps(SWARM))
    with_exif(Path("a1111.jpg"), {}, {0x9286: comment(A1111)})
    command = ["--model", str(demo_bundle), "--steps", "2", "--output", "b.png", "--overwrite"]
    assert main(["--from-image", "swarm.png", *command]) == 0
    unknown, *_ = capsys.readouterr().err.splitlines()
    assert unknown == (
        'sd-run: not understood in swarm.png: <lora:waves:0.8> (adds a LoRA); clipstopatlayer: -2; loras: ["waves"]'
    )
    drawn = read_parameters("b.png")
    assert (drawn.prompt, drawn.scheduler, drawn.rng) == ("a lighthouse at dusk, (storm:1.2)", "DPM++ 2M Karras", "cpu")
    assert main(["--from-image", "a1111.jpg", *command]) == 0
    unknown, *_ = capsys.readouterr().err.splitlines()
    assert unknown == "sd-run: not understood in a1111.jpg: <lora:waves:0.8> (adds a LoRA); Schedule type: Karras"
    assert read_parameters("b.png").scheduler == "Euler a"
    png(Path("edit.png"), parameters=A1111.replace("<lora:waves:0.8>", "[a|b]"))
    assert main(["--from-image", "edit.png", *command]) == 2
    assert "\nsd-run: prompt: not understood: [a|b] (alternates between words)" in capsys.readouterr().err
