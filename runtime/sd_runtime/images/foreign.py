"""What other programs write into their pictures, as AUTOMATIC1111's settings: prompt, negative prompt, name → value.

    SwarmUI                 JSON under "parameters" with sui_image_params (docs/Image Metadata Format.md in its source)
    Fooocus                 JSON there (its scheme "fooocus") or AUTOMATIC1111's text (its scheme "a1111"), as
                            modules/meta_parser.py in its repository writes them
    ComfyUI                 JSON under "prompt": the graph of nodes that made the picture.  Read where one KSampler
                            starts from an empty latent and two texts; what other nodes there are is named

Whatever a program tells and this one has no setting for stays among the settings, under a name of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

MAX_DOCUMENT = 1 << 20  # characters of JSON that we are willing to parse

EMPTY: tuple[Any, ...] = (None, "", "None", [], {}, "[]", "Default (model)")
SWARM_HARMLESS = (
    "aspectratio", "date", "generation_time", "images", "imageformat", "nopreviews", "original_negativeprompt",
    "original_prompt", "personalnote", "prep_time", "swarm_version", "used_wildcards", "wildcardseed", "automaticvae",
)  # fmt: skip
FOOOCUS_HARMLESS = (
    "created_by", "full_negative_prompt", "full_prompt", "metadata_scheme", "performance", "prompt_expansion",
    "refiner_swap_method", "refiner_switch", "styles",
)  # fmt: skip
PLAIN_NODES = ("CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "KSampler", "PreviewImage", "SaveImage",
               "VAEDecode")  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What a picture tells, in AUTOMATIC1111's words."""

    prompt: str
    negative_prompt: str
    settings: dict[str, str]


def read_document(text: str) -> Told | None:
    """SwarmUI's and Fooocus' JSON; None: `text` is no JSON.  UsageError: JSON of a program that is not known."""
    document = _parse(text)
    if document is None:
        return None
    if isinstance(document.get("sui_image_params"), dict):
        return _swarm(document["sui_image_params"])
    if isinstance(document.get("prompt"), dict):
        return read_graph(document["prompt"])
    if isinstance(document.get("prompt"), str) and ("base_model" in document or "metadata_scheme" in document):
        return _fooocus(document)
    raise UsageError("generation parameters", got=text, accepted="those of AUTOMATIC1111, Fooocus and SwarmUI")


def read_comfy(text: str) -> Told | None:
    """ComfyUI's graph; None: `text` is no JSON.  UsageError: a graph that is not one sampler's from an empty latent."""
    graph = _parse(text)
    return None if graph is None else read_graph(graph)


def from_fooocus(settings: dict[str, str]) -> dict[str, str]:
    """The settings of a text in AUTOMATIC1111's format, if Fooocus wrote it in AUTOMATIC1111's sense, too."""
    if not settings.get("Version", "").startswith("Fooocus"):
        return settings
    kept = {key: value for key, value in settings.items() if value not in EMPTY}
    for harmless in ("Raw prompt", "Raw negative prompt", "Performance", "Refiner Swap Method", "User"):
        kept.pop(harmless, None)  # the prompts stand in front as they were drawn, with their styles
    levels = kept.pop("Scheduler", "normal")
    sampler = kept.get("Sampler", "")
    return {"RNG": "CPU"} | kept | ({} if sampler.lower().endswith("karras") else _levels(levels))


def _swarm(said: Mapping[str, Any]) -> Told:
    rest = _Rest(said, SWARM_HARMLESS)
    settings = {
        "Steps": rest.take("steps"),
        "Sampler": rest.take("sampler"),
        **_levels(rest.take("scheduler")),
        "CFG scale": rest.take("cfgscale"),
        "Seed": rest.take("seed"),
        "Size": f"{rest.take('width')}x{rest.take('height')}",
        "Model": model_name(rest.take("model")),
        "RNG": "CPU",
        "Version": f"SwarmUI {said.get('swarm_version', '')}".rstrip(),
    }
    return Told(rest.take("prompt"), rest.take("negativeprompt"), rest.under(settings))


def _fooocus(said: Mapping[str, Any]) -> Told:
    """What was drawn are the full prompts: with the styles, and what the expansion added."""
    rest = _Rest(said, FOOOCUS_HARMLESS)
    prompts = [_joined(said.get(f"full_{name}")) or rest.take(name) for name in ("prompt", "negative_prompt")]
    rest.drop("prompt", "negative_prompt")
    settings = {
        "Steps": rest.take("steps"),
        "Sampler": rest.take("sampler"),
        **_levels(rest.take("scheduler")),
        "CFG scale": rest.take("guidance_scale"),
        "Seed": rest.take("seed"),
        "Size": re.sub(r"[(),\s]+", "x", rest.take("resolution")).strip("x"),
        "Model": model_name(rest.take("base_model")),
        "Model hash": rest.take("base_model_hash"),
        "RNG": "CPU",
        "Version": rest.take("version") or "Fooocus",
    }
    prompt, negative_prompt = map(literal_brackets, prompts)
    return Told(prompt, negative_prompt, rest.under(settings))


def read_graph(graph: Mapping[str, Any]) -> Told:
    """The settings of a graph's one KSampler, of the nodes that lead to it, and which other nodes there are."""
    nodes = {key: node for key, node in graph.items() if isinstance(node, dict) and "class_type" in node}
    kinds = [str(node["class_type"]) for node in nodes.values()]
    samplers = [node for node, kind in zip(nodes.values(), kinds, strict=True) if kind == "KSampler"]
    others = sorted({kind for kind in kinds if kind not in PLAIN_NODES})
    found = None
    if len(samplers) == 1 and not any("sampler" in kind.lower() for kind in others):
        with suppress(KeyError, TypeError, ValueError):
            found = _Graph(nodes).told(samplers[0]["inputs"])
    if found is None:
        got = f"a graph of {', '.join(sorted(set(kinds))) or 'no nodes'}"
        remedy = "say what to draw in words"
        raise UsageError("ComfyUI", got=got, accepted="one KSampler from an empty latent and texts", remedy=remedy)
    return Told(found.prompt, found.negative_prompt, found.settings | ({"Nodes": ", ".join(others)} if others else {}))


class _Graph:
    """ComfyUI's nodes, followed from what they lead to back to what they come from."""

    def __init__(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        self._nodes = nodes

    def told(self, sampler: Mapping[str, Any]) -> Told:
        """KeyError, TypeError or ValueError: the graph is another one than is read here."""
        latent = self._at(sampler["latent_image"], "EmptyLatentImage")
        if float(sampler.get("denoise", 1)) != 1 or isinstance(sampler["seed"], list):
            raise ValueError
        settings = {
            "Steps": str(sampler["steps"]),
            "Sampler": str(sampler["sampler_name"]),
            **_levels(str(sampler["scheduler"])),
            "CFG scale": str(sampler["cfg"]),
            "Seed": str(sampler["seed"]),
            "Size": f"{latent['width']}x{latent['height']}",
            "Model": model_name(self._checkpoint(sampler["model"])),
            "RNG": "CPU",
            "Version": "ComfyUI",
        }
        return Told(self._text(sampler["positive"]), self._text(sampler["negative"]), settings)

    def _at(self, link: Any, kind: str) -> Mapping[str, Any]:
        """The inputs of the node, of this kind, that a link leads to."""
        key, _ = link
        node = self._nodes[str(key)]
        if node["class_type"] != kind:
            raise ValueError
        inputs: Mapping[str, Any] = node["inputs"]
        return inputs

    def _text(self, link: Any) -> str:
        text = self._at(link, "CLIPTextEncode")["text"]
        if not isinstance(text, str):
            raise TypeError
        return literal_brackets(text)

    def _checkpoint(self, link: Any) -> str:
        """The checkpoint's name, past whatever changes it: those nodes are named with the others."""
        for _ in self._nodes:
            key, _ = link
            inputs = self._nodes[str(key)]["inputs"]
            if "ckpt_name" in inputs:
                return str(inputs["ckpt_name"])
            link = inputs["model"]
        raise ValueError


class _Rest:
    """Settings of which some are taken; what is left has a name of its own in the result."""

    def __init__(self, said: Mapping[str, Any], harmless: Collection[str]) -> None:
        self._left = {key: value for key, value in said.items() if key not in harmless and value not in EMPTY}

    def take(self, key: str) -> str:
        return _text(self._left.pop(key, ""))

    def drop(self, *keys: str) -> None:
        for key in keys:
            self._left.pop(key, None)

    def under(self, settings: Mapping[str, str]) -> dict[str, str]:
        """`settings` that say something, and what is left."""
        left = {_name(key): _text(value) for key, value in self._left.items()}
        return left | {key: value for key, value in settings.items() if value not in ("", "x")}


def model_name(path: str) -> str:
    """A checkpoint's name without its folders and its ending: no path of another machine is looked for on this one."""
    return re.sub(r"\.(safetensors|ckpt|sft|gguf)$", "", re.split(r"[\\/]", path)[-1])


def literal_brackets(prompt: str) -> str:
    """A prompt of ComfyUI and Fooocus, to which square brackets are text."""
    return re.sub(r"(?<!\\)([\[\]])", r"\\\1", prompt)


def _levels(scheduler: str) -> dict[str, str]:
    """ComfyUI's name of a spacing of noise levels; "normal" is what AUTOMATIC1111 takes unless told otherwise."""
    return {} if scheduler in ("normal", "") else {"Schedule type": scheduler.replace("_", " ").capitalize()}


def _joined(prompts: Any) -> str:
    return ", ".join(map(str, prompts)) if isinstance(prompts, list) else ""


def _name(key: str) -> str:
    """A key as AUTOMATIC1111's readers take names of settings: two characters or more, letters, digits, blanks, - /."""
    name = re.sub(r"[^\w\-/]+", " ", key).strip()[:60].strip()
    return name if len(name) > 1 else f"setting {name}".rstrip()


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON can spell lone surrogates


def _parse(text: str) -> dict[str, Any] | None:
    """A JSON object, ComfyUI's NaN included; None: it is none."""
    if not text.lstrip().startswith("{") or len(text) > MAX_DOCUMENT:
        return None
    try:
        document = json.loads(text, parse_constant=lambda constant: None)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
