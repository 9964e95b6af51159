"""Pictures equal diffusers' VaeImageProcessor to the last bit, and hostile files are refused before decoding."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from sd_runtime.errors import NumericalError, UsageError
from sd_runtime.images.convert import (
    MAX_PIXELS,
    from_pictures,
    grid,
    open_picture,
    to_pictures,
    to_pixels,
)

PROCESSOR = VaeImageProcessor()


def samples(shape=(2, 3, 24, 40), seed=0):
    """Noise that also leaves [-1, 1], as a VAE's does."""
    return (np.random.default_rng(seed).normal(size=shape) * 0.8).astype(np.float32)


def picture(width=50, height=30, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def preprocess(image, width, height, mode="default"):
    return PROCESSOR.preprocess(image, height=height, width=width, resize_mode=mode).numpy()


# ---- samples → pictures ----------------------------------------------------------------------------------------------


def test_pictures_equal_diffusers_postprocess():
    values = samples()
    ours, theirs = to_pictures(values), PROCESSOR.postprocess(torch.from_numpy(values), "pil")
    assert [image.mode for image in ours] == ["RGB", "RGB"]
    assert [image.size for image in ours] == [(40, 24), (40, 24)]
    assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]


def test_rounding_equals_diffusers_around_every_step_of_the_8_bit_scale():
    """Halves of a step, and the floats next to them, are where another formula would differ."""
    centres = ((np.arange(-2, 513) / 2) / 255 * 2 - 1).astype(np.float32)
    near = [centres]
    for direction in (-np.inf, np.inf):
        values = centres
        for _ in range(4):
            values = np.nextafter(values, np.float32(direction))
            near.append(values)
    values = np.concatenate(near)[: 3 * 1545].reshape(1, 3, 1545, 1)
    theirs = np.asarray(PROCESSOR.postprocess(torch.from_numpy(values), "pil")[0])
    assert (to_pixels(values)[0] == theirs).all()


def test_samples_are_left_as_they_were():
    values = samples()
    kept = values.copy()
    to_pictures(values)
    assert (values == kept).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fault_23_no_picture_is_made_of_numbers_that_are_none(bad):
    values = samples()
    values[1, 2, 3, 4] = bad
    with pytest.raises(NumericalError, match="picture 2: got NaN or infinity"):
        to_pictures(values)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(UsageError, match=r"accepted float32 \(B, 3, H, W\)"):
        to_pictures(np.zeros(shape, np.float32))


def test_grid_equals_diffusers():
    images = [picture(seed=seed) for seed in range(6)]
    assert grid(images, 2, 3).tobytes() == make_image_grid(images, 2, 3).tobytes()
    assert grid(images[:5], 2, 3).size == (150, 60)


@pytest.mark.parametrize(("count", "rows", "columns"), [(0, 1, 1), (5, 2, 2), (1, 0, 1), (1, 1, -1)])
def test_grids_that_cannot_be_are_refused(count, rows, columns):
    with pytest.raises(UsageError, match="grid"):
        grid([picture() for _ in range(count)], rows, columns)


def test_grid_of_pictures_of_several_sizes_is_refused():
    with pytest.raises(UsageError, match="same size"):
        grid([picture(8, 8), picture(16, 8)], 1, 2)


# ---- pictures → samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 30), (64, 64), (24, 16), (8, 40), (128, 96)])
@pytest.mark.parametrize(("ours", "theirs"), [("stretch", "default"), ("crop", "crop")])
def test_resizing_equals_diffusers_preprocess(size, ours, theirs):
    width, height = (side - side % 8 for side in size)
    for source in (picture(), picture(31, 57), picture(200, 11)):
        expected = preprocess(source, width, height, theirs)
        result = from_pictures(source, width=width, height=height, resize=ours)
        assert result.dtype == np.float32
        assert result.flags.c_contiguous
        assert result.shape == (1, 3, height, width)
        assert result.tobytes() == expected.tobytes()


def test_fit_keeps_the_whole_picture_in_the_middle_and_repeats_its_edges():
    source = picture(60, 30)
    result = from_pictures(source, width=48, height=40, resize="fit")
    inner = preprocess(source, 48, 24)
    assert (result[:, :, 8:32] == inner).all()
    assert (result[:, :, :8] == inner[:, :, :1]).all()
    assert (result[:, :, 32:] == inner[:, :, -1:]).all()
    assert from_pictures(picture(1000, 1), width=16, height=16, resize="fit").shape == (1, 3, 16, 16)


def test_a_picture_survives_the_round_trip():
    source = picture(40, 24)
    (back,) = to_pictures(from_pictures(source, width=40, height=24))
    assert back.tobytes() == source.tobytes()


def test_paths_images_and_arrays_are_the_same_picture(tmp_path):
    source = picture(40, 24)
    path = tmp_path / "source.png"
    source.save(path)
    pixels = np.asarray(source)
    several = [source, path, str(path), pixels, pixels.astype(np.float32) / np.float32(255)]
    for size in ((40, 24), (32, 32)):
        result = from_pictures(several, width=size[0], height=size[1])
        assert result.shape == (5, 3, size[1], size[0])
        assert all((one == result[0]).all() for one in result)
    batch = from_pictures(np.stack([pixels, pixels]), width=40, height=24)
    assert batch.shape == (2, 3, 24, 40)


def test_a_float_array_of_the_right_size_is_not_rounded():
    values = np.random.default_rng(0).random((8, 16, 3)).astype(np.float32)
    result = from_pictures(values, width=16, height=8)
    expected = PROCESSOR.preprocess(values[None], height=8, width=16).numpy()
    assert result.tobytes() == expected.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = picture(32, 16)
    source.save(path, exif=exif)
    width, height = (32, 16) if orientation < 5 else (16, 32)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert upright.size == (width, height)
    result = from_pictures(path, width=width, height=height)
    assert (result == preprocess(upright, width, height)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    if mode == "P":  # a palette with one transparent entry
        path = tmp_path / "palette.png"
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([255, 0, 0, 0, 255, 0])
        palette.putpixel((0, 0), 1)
        palette.save(path, transparency=0)
        result = from_pictures(path, width=8, height=8)
        assert (result[0, :, 1, 1] == 1).all()
        assert result[0, :, 0, 0].tolist() == [-1, 1, -1]
        return
    layer = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    layer.putpixel((0, 0), (0, 0, 0, 255))
    result = from_pictures(layer.convert(mode), width=8, height=8)
    assert (result[0, :, 1, 1] == 1).all(), "transparent red is white"
    assert (result[0, :, 0, 0] == -1).all(), "opaque black is black"


def test_half_transparent_colour_is_blended():
    result = from_pictures(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), width=8, height=8)
    np.testing.assert_allclose(result, 127 / 255 * 2 - 1, atol=1e-6)


def test_16_bit_grey_is_scaled_rather_than_clipped(tmp_path):
    path = tmp_path / "grey16.png"
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(path)
    result = from_pictures(path, width=8, height=8)
    np.testing.assert_allclose(result, 128 / 255 * 2 - 1, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    source = picture(16, 8, mode)
    assert (from_pictures(source, width=16, height=8) == preprocess(source.convert("RGB"), 16, 8)).all()


# ---- hostile and mistaken input --------------------------------------------------------------------------------------


def png_header(width, height):
    """A PNG that declares a size and then holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8193, 9500, 20_000, 60_000])
def test_fault_33_picture_bombs_are_refused_by_their_header(tmp_path, monkeypatch, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))

    def decoded(self, *args):
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(UsageError, match=f"at most {MAX_PIXELS} pixels"):
        from_pictures(path, width=64, height=64)


@pytest.mark.parametrize("size", [(1, 60_000_000), (60_000_000, 1)])
@pytest.mark.parametrize("resize", ["crop", "fit", "stretch"])
def test_fault_33_threads_of_a_picture_are_judged_by_their_header(tmp_path, monkeypatch, size, resize):
    """They have fewer pixels than may be; cropped to a square they would have billions in between."""
    path = tmp_path / "thread.png"
    path.write_bytes(png_header(*size))

    def decoded(self, *args):
        raise LookupError("the picture is decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    message = r"^picture '.*thread.*' is too long and thin: got \d+x\d+ pixels, accepted a shape"
    refused = resize == "crop"
    with pytest.raises(UsageError, match=message if refused else r"undamaged files; the picture is decoded"):
        from_pictures(path, width=512, height=512, resize=resize)


def test_too_many_pixels_name_the_file(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_header(9000, 9000))
    with pytest.raises(UsageError, match=r"^picture '.*large.*': got 9000x9000 pixels, accepted at most"):
        from_pictures(path, width=64, height=64)


def test_broken_links_are_not_called_absent(tmp_path):
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "broken.png": "it is a link to 'nowhere.png', which is not there",
        "circle.png": "it is a link that leads to itself",
        "folder.png": "it is a folder",
        "pipe.png": "it is a device or a pipe",
        "absent.png": "there is no such file",
        "file.png/x": "there is no such file",
        "x" * 300: "the name is too long",
        "a\0b": "no file can have this name",
        "a\ud800": "no file can have this name",
    }.items():
        with pytest.raises(UsageError, match=rf"^picture: got .*, accepted a picture file \(.*\); {reason}$"):
            from_pictures(tmp_path / name, width=64, height=64)


def test_an_image_object_that_is_a_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(9000, 9000))
    with Image.open(path) as bomb, pytest.raises(UsageError, match="at most"):
        from_pictures(bomb, width=64, height=64)


def test_a_thread_of_a_picture_does_not_blow_up_when_it_is_cropped():
    with pytest.raises(UsageError, match="long and thin"):
        from_pictures(Image.new("RGB", (60_000, 2)), width=512, height=512)


@pytest.mark.parametrize("format_name", ["GIF", "BMP", "TIFF", "PPM"])
def test_only_png_jpeg_and_webp_are_opened(tmp_path, format_name):
    path = tmp_path / "picture.png"
    picture().save(path, format_name)
    with pytest.raises(UsageError, match="PNG, JPEG, WEBP"):
        from_pictures(path, width=64, height=64)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP"])
def test_png_jpeg_and_webp_are_opened_whatever_the_name_says(tmp_path, format_name):
    path = tmp_path / "picture"
    picture().save(path, format_name)
    assert from_pictures(path, width=48, height=24).shape == (1, 3, 24, 48)


def test_truncated_and_damaged_files_are_usage_errors(tmp_path):
    path, whole = tmp_path / "picture.png", tmp_path / "whole"
    rng = np.random.default_rng(0)
    for format_name in ("PNG", "JPEG", "WEBP"):
        picture(64, 64).save(whole, format_name)
        data = whole.read_bytes()
        for _ in range(60):
            broken = bytearray(data[: rng.integers(0, len(data))])
            for at in rng.integers(0, max(len(broken), 1), 3):
                broken[at : at + 1] = rng.bytes(1)
            path.write_bytes(broken)
            try:
                from_pictures(path, width=16, height=16)
            except UsageError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    "path", ["", "missing.png", "http://localhost/a.png", "/dev/zero", ".", "a\0b.png", "x" * 5000]
)
def test_what_is_not_a_file_is_never_opened(path):
    with pytest.raises(UsageError, match="picture: got"):
        open_picture(path)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.int64),
        np.zeros((0, 8, 3), np.uint8),
        np.full((8, 8, 3), np.nan, np.float32),
        np.full((8, 8, 3), -1.0, np.float32),
        np.full((8, 8, 3), 255.0),
        None,
        7,
        b"bytes",
        [],
        [None],
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(UsageError, match="picture"):
        from_pictures(bad, width=8, height=8)


def test_unknown_resize_mode_is_refused():
    with pytest.raises(UsageError, match="resize: got squash, accepted crop, fit, stretch"):
        from_pictures(picture(), width=8, height=8, resize="squash")


def test_pillow_is_imported_only_for_pictures():
    code = (
        "import sys, numpy; from sd_runtime.images.convert import to_pixels;"
        "import sd_runtime.images.metadata, sd_runtime.images.files;"
        "to_pixels(numpy.zeros((1, 3, 8, 8), numpy.float32));"
        "sys.exit(any(name.split('.')[0] == 'PIL' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
