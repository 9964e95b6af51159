"""The texts that a picture file holds, wherever its format keeps them, and whose they are.

PNG           tEXt, zTXt and iTXt chunks, each with a key
JPEG, WEBP    Exif: a UserComment is what a PNG would have under "parameters", ComfyUI says "prompt:{…}" as Model
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

USER_COMMENT, EXIF_FOLDER = 0x9286, 0x8769
NAMED_TEXTS = ("prompt", "workflow")  # of ComfyUI, told in any Exif text as "prompt:{…}"

# Where programs whose pictures are not read leave their traces, by the key of the text.
NOT_READ = {
    "invokeai_metadata": "InvokeAI",
    "sd-metadata": "InvokeAI",
    "Dream": "InvokeAI",
    "workflow": "ComfyUI",
    "prompt": "Easy Diffusion or another program that writes a text for each setting",
    "generation_data": "Tensor.Art",
    "parameters-json": "Stability Matrix",
}


def texts_of(image: Image) -> dict[str, str]:
    """All texts of a picture file by their keys: those of a PNG, and "parameters", "prompt" … from Exif."""
    texts = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
    if image.format == "PNG":
        return texts
    with warnings.catch_warnings(), suppress(Exception):  # damaged Exif makes Pillow raise anything, and says nothing
        warnings.simplefilter("ignore")
        exif = image.getexif()
        for value in exif.values():
            name, colon, document = value.partition(":") if isinstance(value, str) else ("", "", "")
            if colon and name.lower() in NAMED_TEXTS:
                texts[name.lower()] = document.rstrip("\0")
        comment = exif.get(USER_COMMENT) or exif.get_ifd(EXIF_FOLDER).get(USER_COMMENT)
        if comment:
            texts["parameters"] = comment if isinstance(comment, str) else decode_comment(comment)
    return texts


def decode_comment(comment: bytes) -> str:
    """An Exif UserComment: eight bytes that say how the rest is encoded (Exif 2.32, section 4.6.5).

    Whether UTF-16 has its high bytes first is not told; in text like ours most of those are 0."""
    kind, data = comment[:8], comment[8:]
    if kind == b"UNICODE\0":
        big = data[::2].count(0) >= data[1::2].count(0)
        return data.decode("utf-16-be" if big else "utf-16-le", "replace").lstrip("\ufeff").rstrip("\0")
    known = kind.rstrip(b"\0") in (b"ASCII", b"JIS", b"")
    return (data if known else comment).decode("utf-8", "replace").rstrip("\0")


def program_of(texts: Mapping[str, str]) -> str | None:
    """Which program that is not read has left `texts`; None: there is no trace of one."""
    if "NovelAI" in texts.get("Software", ""):
        return "NovelAI"
    if "Draw Things" in texts.get("XML:com.adobe.xmp", ""):
        return "Draw Things"
    return next((program for key, program in NOT_READ.items() if key in texts), None)
