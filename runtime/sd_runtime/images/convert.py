"""Tensors ↔ pictures: the VAE's samples become 8-bit RGB, pictures become the VAE encoder's input.

A sample is float32 (B, 3, H, W) in [-1, 1]; a picture is a PIL image.  Pillow is imported when a picture is first made
or opened, numpy alone does the rest.  The roundings are those of diffusers' VaeImageProcessor, bit for bit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import NumericalError, UsageError, one_line
from ..fields import Resize, check
from ..tensor import Array, all_finite
from .files import why_unreadable

if TYPE_CHECKING:
    from PIL.Image import Image

Float32: TypeAlias = NDArray[np.float32]
Picture: TypeAlias = "Image | Array | str | os.PathLike[str]"

FORMATS: Final = ("PNG", "JPEG", "WEBP")
MAX_PIXELS: Final = 1 << 26  # 64 megapixels, 192 MiB as RGB: what we are willing to decode or to scale up to


# ---- samples → pictures ----------------------------------------------------------------------------------------------


def to_pictures(samples: Float32) -> list[Image]:
    """(B, 3, H, W) float32 samples, nominally in [-1, 1], → B RGB pictures; what exceeds the range is clipped.

    NumericalError for NaN and infinity, which would otherwise be saved as black."""
    from PIL import Image

    return [Image.fromarray(pixels) for pixels in to_pixels(samples)]


def to_pixels(samples: Float32) -> NDArray[np.uint8]:
    """(B, 3, H, W) float32 samples → (B, H, W, 3) uint8, rounded to nearest, halves to even."""
    if samples.ndim != 4 or samples.shape[1] != 3 or samples.dtype != np.float32:
        raise UsageError("samples", got=f"{samples.dtype}{samples.shape}", accepted="float32 (B, 3, H, W)")
    batch, _, height, width = samples.shape
    pixels = np.empty((batch, height, width, 3), np.uint8)
    for index, sample in enumerate(samples):
        if not all_finite(sample):
            raise NumericalError(f"picture {index + 1}", got="NaN or infinity", accepted="finite samples")
        scaled = sample * np.float32(0.5)
        scaled += np.float32(0.5)
        np.clip(scaled, 0, 1, out=scaled)
        scaled *= np.float32(255)
        pixels[index] = np.rint(scaled, out=scaled).transpose(1, 2, 0)
    return pixels


def grid(images: Sequence[Image], rows: int, columns: int) -> Image:
    """Pictures of one size side by side, row by row; cells that are left over stay black."""
    from PIL import Image

    if not images or len({image.size for image in images}) > 1:
        raise UsageError("grid", got=f"{len(images)} pictures", accepted="at least one, all of the same size")
    if rows < 1 or columns < 1 or len(images) > rows * columns:
        raise UsageError("grid", got=f"{rows}x{columns}", accepted=f"rows times columns of at least {len(images)}")
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


# ---- pictures → samples ----------------------------------------------------------------------------------------------


def from_pictures(
    pictures: Picture | Sequence[Picture], *, width: int, height: int, resize: Resize = "crop"
) -> Float32:
    """Pictures → (B, 3, height, width) float32 samples in [-1, 1], as the VAE encoder takes them.

    A picture is a PIL image, the path of a PNG, JPEG or WEBP file, or an array (H, W, 3) of uint8, or of floats in
    [0, 1], which are taken unrounded where their size already fits; an array (B, H, W, 3) is a batch of them.  EXIF
    orientation is applied, transparency laid on white.  `resize` (Lanczos): "crop" fills the size and cuts what hangs
    over, "fit" keeps the whole picture and repeats its edges, "stretch" distorts; crop and stretch equal diffusers'
    "crop" and "default".

    UsageError: not such a file, too many pixels (judged by its header, before decoding), or wrong values.
    """
    check("resize", resize)
    if isinstance(pictures, np.ndarray):
        pictures = list(pictures) if pictures.ndim == 4 else [pictures]
    elif isinstance(pictures, (str, bytes)) or not isinstance(pictures, Sequence):
        pictures = [pictures]
    if not pictures:
        raise UsageError("pictures", got="none", accepted="at least one")
    return np.stack([_to_sample(picture, (width, height), resize) for picture in pictures])


def _to_sample(picture: Picture, size: tuple[int, int], resize: Resize) -> Float32:
    """One picture → (3, height, width) float32 in [-1, 1]."""
    if isinstance(picture, np.ndarray):
        unit = _unit_array(picture)
        if unit.shape[1::-1] != size:
            unit = _unit_array(_resized(_from_unit_array(unit), size, resize))
    else:
        unit = _unit_array(_resized(_to_rgb(picture, size, resize), size, resize))
    return np.ascontiguousarray(np.float32(2) * unit.transpose(2, 0, 1) - np.float32(1))


def _unit_array(array: Array) -> Float32:
    """(H, W, 3) uint8 or float in [0, 1] → float32 in [0, 1]."""
    kind_ok = array.dtype == np.uint8 or array.dtype.kind == "f"
    if array.ndim != 3 or array.shape[2] != 3 or not array.size or not kind_ok:
        got = f"{array.dtype}{array.shape}"
        raise UsageError("picture array", got=got, accepted="(H, W, 3) of uint8, or of floats from 0 to 1")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # written so that NaN fails
        raise UsageError("picture array", got=f"floats from {low:g} to {high:g}", accepted="floats from 0 to 1")
    return array.astype(np.float32)


def _from_unit_array(unit: Float32) -> Image:
    from PIL import Image

    return Image.fromarray(np.rint(unit * np.float32(255)).astype(np.uint8))


def _to_rgb(picture: Image | str | os.PathLike[str], size: tuple[int, int], resize: Resize) -> Image:
    """A PIL image or file as an upright RGB image without transparency, if it can be brought to `size`."""
    from PIL import Image, ImageOps

    if isinstance(picture, (str, os.PathLike)):
        with open_picture(picture) as opened:
            return _to_rgb(opened, size, resize)
    if not isinstance(picture, Image.Image):
        raise UsageError("picture", got=type(picture).__name__, accepted="a PIL image, a path or an array")
    check_scaling(picture, size, resize)
    try:
        return _without_alpha(ImageOps.exif_transpose(picture))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of all kinds on damaged files
        raise UsageError(
            "picture", got=_name(picture), accepted="undamaged files", remedy=one_line(str(error))
        ) from error


def check_scaling(picture: Image, size: tuple[int, int], resize: Resize) -> None:
    """UsageError, before anything is decoded, for a picture that has, or would on its way to `size` get, more than
    MAX_PIXELS pixels: 1 x 60 000 000 cropped to a square is a million times as large in between."""
    _check_pixels(picture.size, f"picture '{_name(picture)}'")
    turned = picture.size[::-1]  # as Exif may say, which PNG tells after the pixels
    if min(_area(_scaled(one, size, resize)) for one in (picture.size, turned)) > MAX_PIXELS:
        got = f"{picture.width}x{picture.height} pixels"
        accepted = f"a shape that stays below {MAX_PIXELS} pixels when it is brought to {size[0]}x{size[1]}"
        raise UsageError(f"picture '{_name(picture)}' is too long and thin", got=got, accepted=accepted)


def _name(picture: Image) -> str:
    return one_line(str(getattr(picture, "filename", None) or "an image"))


def _without_alpha(image: Image) -> Image:
    """`image` in mode RGB: transparency on white, 16-bit grey scaled down rather than clipped."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, of which Pillow's own conversion keeps the low byte's range only
        grey = np.clip(np.asarray(image), 0, 0xFFFF) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _resized(image: Image, size: tuple[int, int], resize: Resize) -> NDArray[np.uint8]:
    """RGB image → (height, width, 3) uint8; the sizes are rounded down as diffusers rounds them."""
    from PIL.Image import Resampling

    width, height = size
    scaled = _scaled(image.size, size, resize)
    _check_pixels(scaled, "picture too long and thin to crop; scaled")
    pixels = np.asarray(image.resize(scaled, Resampling.LANCZOS))
    left, top = width // 2 - scaled[0] // 2, height // 2 - scaled[1] // 2  # negative where the picture hangs over
    pixels = pixels[max(-top, 0) :, max(-left, 0) :][:height, :width]
    rows, columns, _ = pixels.shape
    left, top = max(left, 0), max(top, 0)
    return np.pad(pixels, ((top, height - rows - top), (left, width - columns - left), (0, 0)), mode="edge")


def _scaled(own: tuple[int, int], size: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """The width and height to which a picture of its `own` is scaled, before it is cut or filled up to `size`."""
    width, height = size
    by_height = own[0] * height // own[1], height  # as high as wanted, in proportion
    by_width = width, own[1] * width // own[0]
    wider = own[0] * height > width * own[1]  # than wanted
    if resize == "stretch":
        scaled = size
    elif resize == "crop":
        scaled = by_height if wider else by_width
    else:
        scaled = by_width if wider else by_height
    return max(scaled[0], 1), max(scaled[1], 1)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def open_picture(path: str | os.PathLike[str], formats: Sequence[str] = FORMATS) -> Image:
    """Open a picture file and check its header; pixels are decoded later, and only from a sane size.

    UsageError: no such file, none of `formats`, or more than `MAX_PIXELS` pixels."""
    from PIL import Image

    file, accepted = Path(path), f"a picture file ({', '.join(formats)})"
    if reason := why_unreadable(file):
        raise UsageError("picture", got=str(path), accepted=accepted, remedy=reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=list(formats))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError("picture", got=f"{path}: {error}", accepted=f"at most {MAX_PIXELS} pixels") from error
    except Exception as error:  # as above
        raise UsageError("picture", got=str(path), accepted=accepted) from error
    try:
        _check_pixels(image.size, f"picture '{one_line(str(path))}'")
    except UsageError:
        image.close()
        raise
    return image


def _check_pixels(size: tuple[int, int], what: str) -> None:
    if _area(size) > MAX_PIXELS:
        raise UsageError(what, got=f"{size[0]}x{size[1]} pixels", accepted=f"at most {MAX_PIXELS} pixels")
