"""Files of every kind, and hostile ones: what is decoded is what a person sees, and only KimiLiteError comes out."""

import io
import os
import signal
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.media import reader as reader_module
from kimi_lite.media.image import Unreadable, read_image
from kimi_lite.media.medium import Source, source_of
from kimi_lite.media.preprocess import Size
from kimi_lite.media.reader import MediaLimits, MediaReader
from tests.media.pictures import Image, encoded, pixels

PHOTO = pixels(40, 30)


def seen(data: bytes) -> np.ndarray:
    """uint8 (H, W, 3) of a file whose image needs no resizing."""
    frame = read_image(io.BytesIO(data), 16384, 1_000_000)
    return np.frombuffer(frame.rows, np.uint8).reshape(frame.size.height, frame.size.width, 3)


def read(data: bytes, limits: MediaLimits | None = None):
    return MediaReader(limits).read(Source("image", "a.png", data=data))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "ICO"])
def test_files_without_loss_give_their_pixels(form: str) -> None:
    more = {"WEBP": {"lossless": True}, "ICO": {"sizes": [(40, 30)]}}.get(form, {})
    assert np.array_equal(seen(encoded(PHOTO, form, **more)), PHOTO)


@pytest.mark.parametrize("form", ["JPEG", "AVIF", "JPEG2000", "HEIF"])
def test_files_with_loss_give_nearly_their_pixels(form: str) -> None:
    if form == "HEIF":
        pytest.importorskip("pillow_heif", reason="pillow-heif is not installed").register_heif_opener()
    try:
        data = encoded(PHOTO, form, quality=95) if form != "JPEG2000" else encoded(PHOTO, form)
    except (KeyError, OSError):
        pytest.skip(f"Pillow writes no {form} here")
    assert np.abs(seen(data).astype(int) - PHOTO).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: PHOTO,
        2: PHOTO[:, ::-1],
        3: PHOTO[::-1, ::-1],
        4: PHOTO[::-1],
        5: PHOTO.transpose(1, 0, 2),
        6: np.rot90(PHOTO, -1),
        7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PHOTO),
    }
    assert np.array_equal(seen(encoded(PHOTO, exif=exif)), turned[orientation])


def test_transparent_parts_are_white() -> None:
    alpha = np.zeros((30, 40), np.uint8)
    alpha[:, 20:] = 255
    half = np.where(alpha[..., None] > 0, PHOTO, 255)
    assert np.array_equal(seen(encoded(np.dstack([PHOTO, alpha]))), half)
    grey = Image.fromarray(PHOTO).convert("L")
    both = Image.merge("LA", (grey, Image.fromarray(alpha)))
    assert np.array_equal(seen(encoded(both))[..., 0], np.where(alpha > 0, np.asarray(grey), 255))
    palette = Image.fromarray(PHOTO).quantize(8)
    expected = np.asarray(palette.convert("RGB")).copy()
    expected[np.asarray(palette) == 3] = 255
    assert np.array_equal(seen(encoded(palette, transparency=3)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(PHOTO).convert(mode)
    data = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert np.array_equal(seen(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_bytes(form: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (30, 40)).astype(np.uint16)
    found = seen(encoded(Image.fromarray(values), form))
    assert np.array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_of_an_animation_the_first_frame_is_taken_and_that_is_said() -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "green")]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
        frame = read_image(io.BytesIO(data), 16384, 1_000_000)
        assert frame.remark == "the first frame of an animation"
        assert np.abs(np.frombuffer(frame.rows, np.uint8).reshape(-1, 3) - [255, 0, 0]).max() <= 2
    assert read_image(io.BytesIO(encoded(PHOTO)), 16384, 1_000_000).remark == ""


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1), (3, 27)])
def test_thin_images_are_read(width: int, height: int) -> None:
    frame = read_image(io.BytesIO(encoded(pixels(width, height))), 16384, 1_000_000)
    assert max(frame.size) <= 7168 and min(frame.size) >= 1
    assert len(frame.rows) == 3 * frame.size.width * frame.size.height


def png_of_header(width: int, height: int, data: bytes = b"", chunks: bytes = b"") -> bytes:
    """A PNG that says it has these pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    body = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return png_of_header(4, 4, bytes(4 * 13), chunks=chunk)


def is_refused_or_read(data: bytes) -> bool:
    """Whether it is patches or one sentence; any other exception comes out."""
    try:
        return read(data, MediaLimits(max_pixels=1_000_000)).items[0].patches.pixels.shape[1:] == (3, 14, 14)
    except KimiLiteError as error:
        return error.message.startswith("a.png ") and "\n" not in error.message


HOSTILE = {
    "nothing": (b"", "is empty"),
    "text": (b"Hello, I am a picture." * 9, "is not a PNG"),
    "a billion pixels in the header": (png_of_header(1 << 15, 1 << 15), "32,768 x 32,768 pixels"),
    "a side of two thousand million": (png_of_header((1 << 31) - 1, 1), "pixels"),
    "cut off": (encoded(PHOTO)[:-300], "is cut off"),
    "half a JPEG": (encoded(pixels(200, 200), "JPEG")[:3000], "is cut off"),
    "a header alone": (encoded(PHOTO)[:33], "is not a PNG"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG drawing"),
    "SVG after a byte order mark": (b"\xef\xbb\xbf <svg/>", "SVG drawing"),
    "PDF": (b"%PDF-1.7\n", "PDF document"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    "floating point": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    "data that ends early": (png_of_header(50, 50, b"abc"), "is cut off"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_image_is_refused_in_a_sentence(name: str) -> None:
    data, words = HOSTILE[name]
    with pytest.raises(KimiLiteError, match=words) as caught:
        read(data)
    assert caught.value.message.startswith("a.png ") and caught.value.message.endswith(".")


def test_a_bomb_in_a_text_chunk_does_no_harm() -> None:
    assert is_refused_or_read(text_bomb())


def test_a_bad_colour_profile_and_a_wrong_name_do_no_harm(tmp_path: Path) -> None:
    profile = encoded(PHOTO, icc_profile=b"nonsense" * 40)
    assert np.array_equal(seen(profile), PHOTO)
    path = tmp_path / "photo.gif"
    path.write_bytes(encoded(PHOTO))
    assert (
        MediaReader().read(Source("image", path.name, path=path)).items[0].digest
        == read(encoded(PHOTO)).items[0].digest
    )


MUTATED = [
    encoded(PHOTO),
    encoded(PHOTO, "JPEG"),
    encoded(PHOTO, "WEBP"),
    encoded(PHOTO, "TIFF"),
    encoded(PHOTO, "BMP"),
    encoded(Image.fromarray(PHOTO).quantize(16), "GIF"),
    encoded(Image.fromarray(PHOTO), "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_and_nothing_else(data: st.DataObject) -> None:
    """Bytes changed, cut out and doubled anywhere in valid files, decoded as the child does it."""
    file = bytearray(data.draw(st.sampled_from(MUTATED)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(file) - 1))
        match data.draw(st.sampled_from(["change", "cut", "double", "end"])):
            case "change":
                file[place] = data.draw(st.integers(0, 255))
            case "cut":
                del file[place : place + data.draw(st.integers(1, 20))]
            case "double":
                file[place:place] = file[place : place + data.draw(st.integers(1, 50))]
            case "end":
                del file[max(place, 1) :]
        file = file or bytearray(b"\0")
    assert is_refused_or_read(bytes(file))


@pytest.mark.parametrize(("is_killed", "words"), [(True, "broke the program"), (False, "takes more than 20 s")])
def test_a_child_that_dies_or_stalls_is_replaced(is_killed: bool, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(PHOTO)
    read(good)
    child = reader_module._worker()._child
    child.send_signal(signal.SIGSTOP)
    if is_killed:
        threading.Timer(0.2, child.kill).start()
    else:
        monkeypatch.setattr(reader_module, "MAX_WAIT_S", 0.2)
    with pytest.raises(KimiLiteError, match=words):
        read(good)
    monkeypatch.undo()
    assert len(read(good).items) == 1
    assert child.poll() is not None


@pytest.mark.parametrize("make", ["folder", "pipe", "device", "link to a device", "missing", "too large"])
def test_what_is_no_ordinary_file_is_refused_at_once(make: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "device":
        path = Path("/dev/zero")
    elif make == "link to a device":
        path.symlink_to("/dev/zero")
    elif make == "too large":
        path.write_bytes(encoded(PHOTO))
    limits = MediaLimits(max_bytes=100)
    with pytest.raises(KimiLiteError):
        MediaReader(limits).read(Source("image", path.name, path=path))


@pytest.mark.parametrize(
    "url",
    ["", "data:", "data:image/png;base64", "data:image/png;base64,@@@", "http://127.0.0.1/a.png", "ms://x", "gopher:x",
     "data:image/png;base64,AAA", None, 7, {"url": None}, {}],
)  # fmt: skip
def test_addresses_that_hold_no_image_are_refused(url: object) -> None:
    with pytest.raises(KimiLiteError):
        source_of({"type": "image_url", "image_url": url})


def test_a_data_url_holds_its_bytes_whatever_it_says_of_them() -> None:
    import base64

    data = encoded(PHOTO)
    text = base64.b64encode(data).decode()
    for url in (f"data:image/png;base64,{text}", f"data:text/html;charset=x;base64,{text}", f"data:;base64,{text}"):
        assert source_of({"type": "image_url", "image_url": {"url": url}}).data == data
        assert source_of({"type": "image", "image": url}).data == data


def test_without_pillow_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KimiLiteError, match="Pillow is needed") as caught:
        read(encoded(PHOTO))
    assert "pip install" in caught.value.hint


def test_pixels_are_counted_before_they_are_decoded() -> None:
    with pytest.raises(Unreadable, match="20,000 x 20,000"):
        read_image(io.BytesIO(png_of_header(20_000, 20_000)), 16384, 1_000_000)
    assert read_image(io.BytesIO(encoded(PHOTO)), 16384, 1200).size == Size(40, 30)
