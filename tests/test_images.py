"""Image files: every kind that occurs is read as what it shows, and what cannot be read says why."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_scoremap.models import SAMPLES, Preprocessing, read_image


@pytest.fixture
def photo() -> Image.Image:
    """A small color image with different corners."""
    rows, columns = np.mgrid[:24, :32]
    return Image.fromarray(np.stack([rows * 10, columns * 7, 255 - rows * 5], -1).astype(np.uint8))


def assert_near(image: Image.Image, expected: Image.Image, tolerance: int) -> None:
    assert (image.mode, image.size) == ("RGB", expected.size)
    difference = np.asarray(image).astype(int) - np.asarray(expected.convert("RGB")).astype(int)
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name: str) -> None:
    image = read_image(f"sample:{name}")
    assert image.mode == "RGB"
    assert min(image.size) >= 300


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("RGB", "png", 0),
        ("L", "png", 0),
        ("1", "png", 0),
        ("CMYK", "tif", 1),
        ("RGBA", "png", 0),
        ("LA", "png", 0),
    ],
)
def test_modes(photo: Image.Image, tmp_path: Path, mode: str, suffix: str, tolerance: int) -> None:
    path = tmp_path / f"image.{suffix}"
    photo.convert(mode).save(path)
    assert_near(read_image(path), photo.convert(mode), tolerance)


def test_palette(photo: Image.Image, tmp_path: Path) -> None:
    palette = photo.quantize(16)
    palette.save(tmp_path / "image.png")
    assert_near(read_image(tmp_path / "image.png"), palette, 0)


def test_cmyk_jpeg(photo: Image.Image, tmp_path: Path) -> None:
    photo.convert("CMYK").save(tmp_path / "image.jpg", quality=100)
    assert_near(read_image(tmp_path / "image.jpg"), photo, 12)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grayscale_keeps_its_range(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    image = np.asarray(read_image(tmp_path / f"deep.{suffix}"))
    np.testing.assert_array_equal(image[0, :, 0], [0, 100, 255])


def test_float_grayscale(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.2, 1.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "float.tif"))[0, :, 1], [0, 51, 255])
    Image.fromarray(np.array([[0.0, 3.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float.tif.*values of a 'F' image must lie in 0 to 1, got 0 to 3"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0)).convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (4, 4), 1)
        image.putpixel((0, 0), 0)
        image.putpalette([0, 0, 0, 200, 100, 50])
        image.save(tmp_path / "image.png", transparency=1)
    else:
        image.convert(mode).save(tmp_path / "image.png")
    read = read_image(tmp_path / "image.png")
    assert (read.getpixel((0, 0)), read.getpixel((3, 3))) == ((0, 0, 0), (255, 255, 255))


def test_half_transparent_black_is_gray(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "image.png")
    assert read_image(tmp_path / "image.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(photo: Image.Image, tmp_path: Path, orientation: int) -> None:
    # How a camera held in that way stores the upright scene (EXIF 2.32, 4.6.4).
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (photo if stored is None else photo.transpose(stored)).save(tmp_path / "image.png", exif=exif)
    assert_near(read_image(tmp_path / "image.png"), photo, 0)


def test_unreadable_files(photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    cases = {
        "truncated.png": (whole[: len(whole) // 2], "truncated"),
        "empty.png": (b"", "the file is empty"),
        "text.png": (b"not an image at all", "not an image file that Pillow knows"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"image must be a readable file, got '.*{name}': .*{reason}"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"missing.png': no such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"image must be a readable file, got .*: "):
        read_image(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"whole.png': .*decompression bomb"):
        read_image(tmp_path / "whole.png")


def test_sample_names_are_suggested() -> None:
    with pytest.raises(ValueError, match=r"sample must be one of chelsea, .*got 'chelsee'. Did you mean 'chelsea'"):
        read_image("sample:chelsee")
    with pytest.raises(ValueError, match=r"got 'coffee': no such file. Did you mean 'sample:coffee'"):
        read_image("coffee")


def test_whole_image_has_the_scale_of_the_crop() -> None:
    preprocessing = Preprocessing(resize=64, crop=48)
    image = read_image("sample:chelsea")
    whole, crop = preprocessing.whole(image), preprocessing(image)
    assert whole.shape == (3, 64, 96)
    torch.testing.assert_close(whole[:, 8:56, 24:72], crop, rtol=0, atol=0)
    assert Preprocessing(resize=64, crop=None)(image).shape == (3, 64, 96)
