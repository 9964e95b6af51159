"""What a request starts from beside its seeds' noise: given noise, or pictures to change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UsageError
from .images.convert import Picture, from_pictures
from .request import Request
from .tensor import Array, all_finite


@dataclass(frozen=True)
class Inputs:
    """latents   (B, C, h, w) float32, unit noise in place of that of the seeds
    pictures  (1 or P, 3, H, W) float32 in [-1, 1], to be changed: one for all prompts, or one each

    At most one of the two is given."""

    latents: Array | None = None
    pictures: Array | None = None

    def row_of(self, request: Request, image: int) -> int:
        """The row of `pictures` that picture `image` of the request starts from."""
        return 0 if self.pictures is None or len(self.pictures) == 1 else image // request.num_images_per_prompt


NO_INPUTS = Inputs()


def make_inputs(
    request: Request,
    latent_shape: tuple[int, ...],
    image: Picture | Sequence[Picture] | None = None,
    latents: Array | None = None,
) -> Inputs:
    """Check what comes with a request, and bring pictures to its size.  `latent_shape`: (C, h, w) of one picture.

    UsageError: pictures without strength or the reverse, both pictures and latents, a wrong number, shape or file."""
    if (image is None) != (request.strength is None):
        raise UsageError(
            "`strength` without an image to change" if image is None else "an image to change without `strength`",
            got=request.strength,
            remedy="give the image, or leave `strength` out" if image is None else "give a `strength` from 0 to 1",
        )
    if image is not None and latents is not None:
        raise UsageError("image and latents", accepted="one of them", remedy="noise for an image comes from its seed")
    if latents is not None:
        return Inputs(latents=as_latents("latents", latents, (request.num_images, *latent_shape)))
    if image is None:
        return NO_INPUTS
    pictures = from_pictures(image, width=request.width, height=request.height, resize=request.resize)
    if len(pictures) not in (1, len(request.prompts)):
        raise UsageError("number of images", got=len(pictures), accepted=f"1 or {len(request.prompts)}, one a prompt")
    return Inputs(pictures=pictures)


def as_latents(name: str, latents: object, expected: tuple[int | None, ...]) -> Array:
    """`latents` as finite float32 of the shape `expected` (B, C, h, w), in which None stands for any size.

    Floats of any width are taken, and tensors of other libraries that numpy can read; (C, h, w) is one picture's.
    UsageError, under this name, for all else."""
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    accepted = f"float32({sizes})"
    array = latents if isinstance(latents, np.ndarray) else _from_tensor(latents)
    if array is None:
        raise UsageError(name, got=type(latents).__name__, accepted=f"{accepted}, a numpy array")
    if array.ndim == len(expected) - 1 and expected[0] in (None, 1):
        array = array[None]
    fits = array.ndim == len(expected) and all(b in (None, a) for a, b in zip(array.shape, expected, strict=True))
    if array.dtype.kind != "f" or not fits:
        raise UsageError(name, got=f"{array.dtype}{array.shape}", accepted=accepted)
    with np.errstate(over="ignore"):
        converted: Array = np.asarray(array, np.float32)
    if not all_finite(converted):
        raise UsageError(name, got="NaN or infinity", accepted="finite numbers in the range of float32")
    return converted


def _from_tensor(value: Any) -> Array | None:
    """A tensor of another library as an array; None: numpy cannot read it."""
    if not hasattr(value, "__array__"):
        return None
    try:
        for readable in ("detach", "cpu"):  # what torch wants to be asked first
            value = getattr(value, readable, lambda value=value: value)()
        return np.asarray(value)
    except Exception:  # a library's own reasons: a type that numpy lacks, a device that is gone
        return None


def check_size(height: int, width: int, latents: Sequence[tuple[int, int]], pixels: int) -> None:
    """UsageError, with the nearest size that would do, unless the network takes pictures of this size.

    latents: the smallest and the largest size of its input's axes (B, C, h, w), in cells of `pixels` pixels."""
    for name, size, (low, high) in zip(("height", "width"), (height, width), latents[2:], strict=True):
        if size % pixels or not low * pixels <= size <= high * pixels:
            nearest = min(max(round(size / pixels), low), high) * pixels
            accepted = f"multiples of {pixels} from {low * pixels} to {high * pixels}"
            raise UsageError(name, got=size, accepted=accepted, remedy=f"nearest: {nearest}")


def digest(array: Array) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of an array's values: enough to tell pictures apart."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
