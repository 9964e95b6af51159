"""What a picture says about itself: its generation parameters, written into the PNG and read back.

Three text chunks:

    parameters           AUTOMATIC1111's format, which most tools and sites read: the prompt, "Negative prompt: …" on a
                         line of its own if there is one, last "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, …"
    sd_runtime           the same as JSON, because a prompt may hold lines that look like the other two.  Our reader
                         prefers it as long as the first chunk still says the same: some tools rewrite only that.
    XML:com.adobe.xmp    XMP with IPTC's digital source type trainedAlgorithmicMedia: made by a generative model
"""

from __future__ import annotations

import io
import json
import math
import operator
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from ..bundle.schema import from_json, parse_json, to_json
from ..errors import BundleError, UsageError
from ..fields import shortest
from .files import FileTakenError, free_names, write_file
from .foreign import Told, from_fooocus, read_comfy, read_document
from .texts import program_of, texts_of

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT_CHUNK: Final = "parameters"
JSON_CHUNK: Final = "sd_runtime"
XMP_CHUNK: Final = "XML:com.adobe.xmp"
MAX_TEXT: Final = 1 << 20  # characters that we are willing to read
READ: Final = "sd-run, AUTOMATIC1111, ComfyUI, Fooocus and SwarmUI"  # whose pictures

XMP: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    ' Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)

_KEY: Final = r"\w[\w \-/]{0,60}[\w\-/]"
_PAIR: Final = re.compile(rf'\s*({_KEY})\s*:\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')  # linear on hostile text
_OWN_KEYS: Final = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "RNG", "Version")
_AUTOMATIC: Final = {  # what "Schedule type: Automatic" is for these: modules/sd_samplers_kdiffusion.py
    **dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "DPM2", "DPM2 a", "Restart"), "Karras"),
    **dict.fromkeys(("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"), "Exponential"),
}
_RNG_NAMES: Final = {"cpu": "CPU", "cuda": "NV"}  # NV: the noise of NVIDIA cards, computed on the host


@dataclass(frozen=True)
class Parameters:
    """What repeats a picture.  None: not known, as other programs leave out what they please.

    scheduler   the sampler's name as AUTOMATIC1111 writes it, "DPM++ 2M Karras"
    rng         whose noise the seed stands for: torch's CPU or CUDA generator
    model_hash  the first digits of the weights' SHA-256
    version     of the program that drew it
    extra       all other settings, by AUTOMATIC1111's names where it has one ("Denoising strength"), as text
    """

    prompt: str
    negative_prompt: str = ""
    num_inference_steps: int | None = None
    scheduler: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str | None = None
    model_hash: str | None = None
    rng: Literal["cpu", "cuda"] | None = None
    version: str | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.extra:
            if not re.fullmatch(_KEY, key) or key in _OWN_KEYS:
                raise UsageError("name of an extra parameter", got=key, accepted="words that no other field uses")
        if self.guidance_scale is not None and not abs(self.guidance_scale) < math.inf:
            raise UsageError("guidance_scale", got=self.guidance_scale, accepted="finite numbers")
        if (self.width is None) != (self.height is None):
            raise UsageError("size", got=f"{self.width}x{self.height}", accepted="both width and height, or neither")
        try:
            format_parameters(self).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError("parameters", got=error.object[error.start], accepted="Unicode text") from error


# ---- the text format -------------------------------------------------------------------------------------------------


def format_parameters(parameters: Parameters) -> str:
    """AUTOMATIC1111's text."""
    size = None if parameters.width is None else f"{parameters.width}x{parameters.height}"
    settings = {
        "Steps": parameters.num_inference_steps,
        "Sampler": parameters.scheduler,
        "CFG scale": None if parameters.guidance_scale is None else shortest(parameters.guidance_scale),
        "Seed": parameters.seed,
        "Size": size,
        "Model hash": parameters.model_hash,
        "Model": parameters.model,
        **parameters.extra,
        "RNG": None if parameters.rng is None else _RNG_NAMES[parameters.rng],
        "Version": parameters.version,
    }
    pairs = ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items() if value is not None)
    negative = f"\nNegative prompt: {parameters.negative_prompt}" if parameters.negative_prompt else ""
    return f"{parameters.prompt}{negative}\n{pairs}"


def parse_parameters(text: str) -> Parameters:
    """AUTOMATIC1111's text, from whatever program, as Parameters.

    Takes any Unicode text: a value that is not what its name promises stays in `extra`, and a text without settings is
    a prompt.  Ambiguous where a prompt holds a line of settings or one that starts with "Negative prompt:"."""
    lines = text[:MAX_TEXT].replace("\r\n", "\n").rstrip("\n").split("\n")
    at = _find_settings(lines)
    settings = from_fooocus(_parse_pairs(lines[at])) if at < len(lines) else {}
    prompts = lines[:at]
    negative_at = next((i for i, line in enumerate(prompts) if line.startswith("Negative prompt:")), len(prompts))
    negative = "\n".join(prompts[negative_at:])[len("Negative prompt:") :].removeprefix(" ")
    return _from_settings("\n".join(prompts[:negative_at]), negative, settings)


def _find_settings(lines: list[str]) -> int:
    """The index of the line of settings, len(lines) if there is none.

    That is the last line, if it has three pairs or more; some extensions append lines of their own, hence a line that
    starts with "Steps:" before those counts as well."""
    for index in range(len(lines) - 1, -1, -1):
        if (index == len(lines) - 1 or lines[index].startswith("Steps:")) and len(_parse_pairs(lines[index])) >= 3:
            return index
    return len(lines)


def _parse_pairs(line: str) -> dict[str, str]:
    """'Steps: 20, Model: "a, b"' → {"Steps": "20", "Model": "a, b"}; what is no pair is skipped to the next comma."""
    pairs, position = {}, 0
    while position < len(line):
        match = _PAIR.match(line, position)
        if match:
            pairs[match[1]] = _unquote(match[2].strip())
            position = match.end()
        else:
            comma = line.find(",", position)
            position = len(line) if comma < 0 else comma + 1
    return pairs


def _from_settings(prompt: str, negative_prompt: str, settings: dict[str, str]) -> Parameters:
    """Typed fields from AUTOMATIC1111's names; what has no field, or not the form that its name promises, is extra."""
    extra = dict(settings)

    def take(key: str, pattern: str = "(?s).*") -> str | None:
        return extra.pop(key) if key in extra and re.fullmatch(pattern, extra[key]) else None

    steps, seed = take("Steps", r"\d{1,9}"), take("Seed", r"-?\d{1,20}")
    size, scale = take("Size", r"\d{1,9}x\d{1,9}"), take("CFG scale", r"-?\d{1,20}(\.\d{1,20})?(e[-+]?\d{1,2})?")
    scheduler, spacing = take("Sampler"), take("Schedule type", "Karras|Exponential|Automatic|Uniform")
    if spacing == "Automatic":
        spacing = _AUTOMATIC.get(scheduler or "")
    if scheduler and spacing and spacing != "Uniform":
        scheduler = f"{scheduler} {spacing}"  # since version 1.9 the two are written apart
    rng = take("RNG", "CPU|NV|GPU")
    width, height = map(int, size.split("x")) if size else (None, None)
    return Parameters(
        prompt=prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=int(steps) if steps else None,
        scheduler=scheduler,
        guidance_scale=float(scale) if scale else None,
        seed=int(seed) if seed else None,
        width=width,
        height=height,
        model=take("Model"),
        model_hash=take("Model hash"),
        rng=None if rng is None else "cpu" if rng == "CPU" else "cuda",
        version=take("Version"),
        extra={(f"other {key}" if key in _OWN_KEYS else key): value for key, value in extra.items()},
    )


def _quote(value: str) -> str:
    """A value as JSON where it would not survive as it is."""
    plain = value and value == value.strip() and not re.search(r'[,:\n\r]|^"', value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        text = str(json.loads(value))
        text.encode("utf-8")  # JSON can spell lone surrogates
    except ValueError:
        return value
    return text


# ---- pictures on disk ------------------------------------------------------------------------------------------------


def save_png(
    image: Image, path: str | os.PathLike[str], *, parameters: Parameters | None = None, overwrite: bool = False
) -> Path:
    """Save a picture with its parameters and the mark of AI-made media; `path` is never half written.

    UsageError: the name is taken and `overwrite` is False, or its folder is missing.  SDError: the disk is full, ..."""
    return write_file(Path(path), png_bytes(image, parameters), overwrite=overwrite)


def save_numbered_png(image: Image, folder: str | os.PathLike[str], *, parameters: Parameters | None = None) -> Path:
    """Save as picture-0001.png or the next free number in `folder`; several processes may do so at once."""
    data, names = png_bytes(image, parameters), free_names(Path(folder))
    while True:
        with suppress(FileTakenError):
            return write_file(next(names), data)


def png_bytes(image: Image, parameters: Parameters | None = None, description: str | None = None) -> bytes:
    """A picture as a PNG file's content, with the chunks that this module's head describes, and a Description."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if parameters is not None:
        chunks.add_text(TEXT_CHUNK, format_parameters(parameters))
        chunks.add_text(JSON_CHUNK, parameters_json(parameters))
    if description is not None:
        chunks.add_text("Description", description)
    chunks.add_itxt(XMP_CHUNK, XMP)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def parameters_json(parameters: Parameters, indent: int | None = None) -> str:
    """All that `parameters` holds, as JSON."""
    return json.dumps(to_json(parameters), indent=indent, ensure_ascii=indent is None, default=operator.index)


def read_parameters(path: str | os.PathLike[str]) -> Parameters:
    """The parameters in a picture of ours or of the programs that `foreign` describes.

    UsageError: not a picture, it says nothing, or what another program says is not read."""
    from .convert import open_picture

    with open_picture(path) as image:
        texts = texts_of(image)
    try:
        read = _parse_texts(texts)
    except UsageError as error:
        raise UsageError(f"'{path}': {error.what}", got=error.got, accepted=error.accepted) from error
    if read is None:
        program = program_of(texts)
        got = f"{path}, with the metadata of {program}, which is not read" if program else str(path)
        raise UsageError("picture", got=got, accepted=f"a picture with generation parameters, as {READ} save it")
    return read


def _parse_texts(texts: Mapping[str, str]) -> Parameters | None:
    """The parameters in a picture's texts, ours before other programs'; None: there are none."""
    text = texts.get(TEXT_CHUNK)
    if text is not None:
        exact = _parse_document(texts[JSON_CHUNK]) if JSON_CHUNK in texts else None
        if exact is not None and format_parameters(exact) == text:
            return exact
        told = read_document(text)
        return _from_told(told) if told is not None else parse_parameters(text)
    told = read_comfy(texts["prompt"]) if "prompt" in texts else None
    return None if told is None else _from_told(told)


def _from_told(told: Told) -> Parameters:
    return _from_settings(told.prompt, told.negative_prompt, told.settings)


def _parse_document(document: str) -> Parameters | None:
    """Our JSON chunk, or None where it is damaged or a later version's."""
    try:
        return from_json(Parameters, parse_json(document.encode("utf-8"), JSON_CHUNK, MAX_TEXT))
    except (BundleError, UsageError, UnicodeEncodeError):
        return None
