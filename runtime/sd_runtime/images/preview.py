"""Previews: latents → small pictures, a pixel a latent cell, guessed without the VAE.

A cell's colour is a matrix times its features: its C channels, for larger matrices also the products of each two of
them, and a constant.  Linear is enough for Stable Diffusion's latents; small autoencoders bend more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError
from ..tensor import Array
from .convert import grid, to_pictures

if TYPE_CHECKING:
    from PIL.Image import Image

Float32: TypeAlias = NDArray[np.float32]

SMALLEST_CELL: Final = 64  # pixels on a strip

# Colours of Stable Diffusion 1.x and 2.x latents: four channels and a constant → RGB in [-1, 1].  K. Turner, "Decoding
# latents to RGB without upscaling", Hugging Face forum, 2022.
SD1_PREVIEW: Final[Float32] = np.array(
    [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473], [0, 0, 0]],
    np.float32,
)


def preview(latents: Float32, matrix: Float32 = SD1_PREVIEW) -> list[Image]:
    """(B, C, h, w) latents → B pictures of w × h pixels.  BundleError: the matrix is for another number of channels.

    matrix: (C + 1, 3) float32, or (C + C(C+1)/2 + 1, 3) with products, the constant last → RGB in [-1, 1]."""
    channels = latents.shape[1]
    sizes = [_count(channels, quadratic) for quadratic in (False, True)]
    if matrix.ndim != 2 or matrix.shape[0] not in sizes or matrix.shape[1] != 3:
        accepted = " or ".join(f"({size}, 3)" for size in sizes)
        raise BundleError("preview matrix", got=matrix.shape, accepted=f"{accepted} for {channels} channels")
    features = _features(latents, quadratic=matrix.shape[0] == sizes[1])
    return to_pictures(np.einsum("bfhw,fr->brhw", features, matrix).astype(np.float32))


def fit_preview_matrix(latents: Float32, samples: Float32, *, quadratic: bool = False) -> Float32:
    """The matrix for `preview` that comes closest, in least squares, to what the VAE makes of these latents.

    latents (B, C, h, w) and the samples (B, 3, k·h, k·w) in [-1, 1] that they decode to; a few pictures suffice."""
    batch, _, height, width = latents.shape
    blocks = samples.reshape(batch, 3, height, samples.shape[2] // height, width, samples.shape[3] // width)
    colours = blocks.mean(axis=(3, 5)).transpose(0, 2, 3, 1).reshape(-1, 3)
    features = _features(latents, quadratic=quadratic)
    cells = features.transpose(0, 2, 3, 1).reshape(-1, features.shape[1])
    matrix: Array = np.linalg.lstsq(cells, colours, rcond=None)[0]
    return matrix.astype(np.float32)


def strip(rows: Sequence[Sequence[Image]], columns: int) -> Image:
    """Pictures of one size in rows of `columns`, each enlarged by a whole factor so that it can be seen."""
    width, height = rows[0][0].size
    factor = max(1, -(-SMALLEST_CELL // max(width, height)))
    blank = rows[0][0].point(lambda _: 0)
    cells = [cell for row in rows for cell in [*row, *[blank] * (columns - len(row))]]
    sheet = grid(cells, len(rows), columns)
    return sheet.resize((sheet.width * factor, sheet.height * factor), resample=0)  # 0: nearest


def _features(latents: Float32, *, quadratic: bool) -> Array:
    """(B, C, h, w) → (B, F, h, w): the channels, with `quadratic` the products of each two, and 1."""
    channels = latents.transpose(1, 0, 2, 3)
    products = [a * b for a, b in combinations_with_replacement(channels, 2)] if quadratic else []
    return np.stack([*channels, *products, np.ones_like(channels[0])], axis=1)


def _count(channels: int, quadratic: bool) -> int:
    return channels + (channels * (channels + 1) // 2 if quadratic else 0) + 1
