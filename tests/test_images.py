"""Image files: every kind that occurs is read as what it shows, and what cannot be read says why."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_scoremap.data.sources import DatasetSource
from captum_scoremap.models import SAMPLES, Preprocessing, read_image
from captum_scoremap.visualization.checked import checked_picture


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


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "L", "1", "P", "LA", "RGBA", "RGB", "CMYK"])
def test_every_way_in_sees_the_same_picture(photo: Image.Image, tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode in {"F", "I", "CMYK"} else "image.png")
    gray = np.asarray(photo.convert("L"))
    if mode in {"I;16", "I", "F"}:
        Image.fromarray(gray / np.float32(255) if mode == "F" else gray.astype({"I": "i4"}.get(mode, "u2")) * 257).save(
            path
        )
    else:
        transparent = {"transparency": 0 if mode == "P" else (0, 0, 255)} if mode in {"P", "RGB"} else {}
        photo.convert(mode).save(path, **transparent)
    with Image.open(path) as opened:
        assert opened.mode[0] == mode[0]
        expected = np.asarray(read_image(path))
        plain = Preprocessing((24, 32), None, (0.0,) * 3, (1.0,) * 3)(opened)
        single = Preprocessing((24, 32), None, (0.0,), (1.0,))(opened)
        item = DatasetSource([opened]).read(0).image
        drawn = checked_picture(opened, None, None)
    np.testing.assert_allclose(plain.movedim(0, -1) * 255, expected, atol=1e-3)
    np.testing.assert_allclose(single[0] * 255, np.asarray(read_image(path).convert("L")), atol=1e-3)
    np.testing.assert_allclose(np.asarray(item), expected)
    np.testing.assert_allclose(drawn * 255, expected, atol=1e-3)
    if mode in {"I;16", "I", "F"}:
        np.testing.assert_allclose(expected[..., 0], gray)


def test_pictures_too_narrow_to_be_enlarged_say_so() -> None:
    with pytest.raises(ValueError, match="40000 x 1 pixels are too long and narrow to be resized to 256"):
        Preprocessing(256, 224)(Image.new("RGB", (40000, 1)))
    assert Preprocessing(256, 224)(Image.new("RGB", (1, 300))).shape == (3, 224, 224)
    assert Preprocessing((8, 8), None)(Image.new("RGB", (40000, 1))).shape == (3, 8, 8)


@pytest.mark.parametrize("size", [(1, 1), (60, 1), (1, 41), (640, 1), (2, 3), (3000, 2)])
@pytest.mark.parametrize("crop", [None, 1, 32, 36])
def test_what_is_seen_of_a_picture_is_a_pixel_at_least(size: tuple[int, int], crop: int | None) -> None:
    x0, y0, x1, y1 = Preprocessing(36, crop).box(size)
    assert 0 <= x0 < x1 <= size[0]
    assert 0 <= y0 < y1 <= size[1]


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
