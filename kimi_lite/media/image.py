"""An image file to resized RGB rows, with Pillow. Runs in the process of `media.child`.

What a person sees is what the model gets: turned as the camera's EXIF says, transparent parts on white, the first frame
of an animation, 16-bit grey by its upper bytes. Colour profiles are ignored, as the vendor's preprocessing does. Only
formats of pixels are opened: no PostScript, no SVG, no PDF.
"""

import warnings
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from kimi_lite.media.preprocess import Size, resized

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000")
NAMES = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
_NO_PIXELS = {  # how other files begin that people take for images
    b"<svg": "an SVG drawing",
    b"%PDF": "a PDF document",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"8BPS": "a Photoshop document",
}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


class Unreadable(Exception):
    """What is wrong with a file, without its name, and what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Frame(NamedTuple):
    """RGB rows after resizing, and what a person should know."""

    rows: bytes
    size: Size
    remark: str = ""


def read_image(file: BinaryIO, max_patches: int, max_pixels: int) -> Frame:
    """Decode and resize; Unreadable, or whatever Pillow raises at damaged files."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # looked at below, before anything is decoded
    warnings.simplefilter("ignore")
    has_heif = _register_heif()
    head = file.read(512)
    file.seek(0)
    _require_pixels(head, has_heif)
    formats = (*FORMATS, "HEIF") if has_heif else FORMATS
    with Image.open(file, formats=[name for name in formats if name in _known_formats()]) as image:
        require_size(image.width, image.height, max_pixels)
        remark = "the first frame of an animation" if getattr(image, "is_animated", False) else ""
        image.seek(0)
        return resize(upright_rgb(image), max_patches, remark)


def require_size(width: int, height: int, max_pixels: int) -> None:
    """Unreadable where that many pixels would be decoded."""
    if width * height > max_pixels:
        raise Unreadable(
            f"has {width:,} x {height:,} pixels; {max_pixels / 1e6:,.0f} million can be read", "Make it smaller."
        )
    if width < 1 or height < 1:
        raise Unreadable("has no pixels")


def upright_rgb(image):
    """A Pillow image as it is meant to be seen, in RGB."""
    from PIL import Image, ImageOps

    image.load()
    with suppress(Exception):  # damaged EXIF says nothing
        image = ImageOps.exif_transpose(image)
    if image.mode in ("F",):
        raise Unreadable("has floating-point pixels", "Save it with 8 bits.")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    is_transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not is_transparent:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def resize(image, max_patches: int, remark: str = "") -> Frame:
    """An RGB image of Pillow's by the published rule."""
    from PIL import Image

    size = resized(Size(*image.size), max_patches)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return Frame(image.tobytes(), size, remark)


def _known_formats() -> set[str]:
    from PIL import Image

    Image.init()
    return set(Image.OPEN)


def _require_pixels(head: bytes, has_heif: bool) -> None:
    """Unreadable for what is known to be no image of pixels, or one that wants a package."""
    if not head:
        raise Unreadable("is empty")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, name in _NO_PIXELS.items():
        if start.startswith(magic) or (magic == b"<svg" and start.startswith(b"<") and magic in start):
            raise Unreadable(f"is {name}, not an image of pixels", "Export it as PNG.")
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and not has_heif:
        raise Unreadable("is a HEIC image, which needs a package that is not installed", "pip install pillow-heif")


def _register_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True
