"""Latents to small pictures without the decoder."""

from __future__ import annotations

import numpy as np
import pytest
from sd_runtime.errors import BundleError
from sd_runtime.images.preview import SD1_PREVIEW, fit_preview_matrix, preview, strip


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoded(latents: np.ndarray, matrix: np.ndarray, products: bool = False) -> np.ndarray:
    """What a decoder would make that has this matrix and nothing else, 8 pixels a cell."""
    rows = np.moveaxis(latents, 1, -1)
    pairs = [(i, j) for i in range(4) for j in range(i, 4)] if products else []
    features = np.stack([*np.moveaxis(rows, -1, 0), *(rows[..., i] * rows[..., j] for i, j in pairs)], axis=-1)
    return np.moveaxis(features @ matrix[:-1] + matrix[-1], -1, 1).repeat(8, axis=2).repeat(8, axis=3)


def test_preview_is_the_matrix_applied_to_each_cell() -> None:
    latents, matrix = normal((2, 4, 5, 7)), normal((5, 3), seed=1)
    _, second = preview(latents, matrix)
    assert second.size == (7, 5)
    expected = np.clip(decoded(latents, matrix)[1, :, 4 * 8, 6 * 8] / 2 + 0.5, 0, 1) * 255
    assert np.allclose(second.getpixel((6, 4)), expected, atol=0.51)


@pytest.mark.parametrize(("rows", "quadratic"), [(5, False), (15, True)])
def test_a_decoder_of_that_form_is_fitted_exactly(rows: int, quadratic: bool) -> None:
    latents, matrix = normal((3, 4, 8, 8)), normal((rows, 3), seed=1)
    fitted = fit_preview_matrix(latents, decoded(latents, matrix, quadratic), quadratic=quadratic)
    np.testing.assert_allclose(fitted, matrix, atol=1e-4)
    (picture, *_) = preview(latents, fitted)
    expected = np.clip(decoded(latents, matrix, quadratic)[0, :, 0, 0] / 2 + 0.5, 0, 1) * 255
    assert np.allclose(picture.getpixel((0, 0)), expected, atol=0.51)


def test_a_matrix_for_other_latents_is_refused() -> None:
    with pytest.raises(BundleError, match=r"preview matrix: got \(5, 3\), accepted \(17, 3\) or \(153, 3\) for 16"):
        preview(normal((1, 16, 4, 4)), SD1_PREVIEW)


def test_a_strip_has_a_row_a_picture_and_room_for_what_is_to_come() -> None:
    first, second = preview(normal((2, 4, 8, 8)))
    sheet = strip([[first, second], [second]], columns=3)
    assert sheet.size == (3 * 64, 2 * 64)
    assert sheet.getpixel((64, 0)) == second.getpixel((0, 0))
    assert sheet.getpixel((191, 127)) == (0, 0, 0)
