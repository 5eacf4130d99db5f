"""A small picture of an image in the terminal: in pixels where the terminal is known to show them (kitty's protocol,
iTerm2's, sixel), in half blocks elsewhere; nothing where there is no terminal or no colour.
"""

import base64
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from rich.color import Color
from rich.style import Style
from rich.text import Text

from kimi_lite.model.vision.patches import PATCH, Patches
from kimi_lite.terminal import Console, can_redraw, send_picture

Protocol = Literal["kitty", "iterm2", "sixel", "blocks"]
MOST_COLUMNS, MOST_ROWS = 32, 10
_CELL = (8, 16)  # pixels of a character, about: only the shape counts
_KITTY_CHUNK = 4096  # characters of one escape sequence
_LEVELS = 6  # of each colour in a sixel picture


def protocol_of(environment: Mapping[str, str]) -> Protocol:
    """What the terminal understands, by the names that terminals give themselves. A multiplexer takes none of them."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return "blocks"
    if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    if "sixel" in term or term.startswith(("foot", "mlterm", "contour")):
        return "sixel"
    return "blocks"


def show_thumbnail(console: Console, patches: Patches) -> None:
    """The first frame, at most 32 x 10 characters large; nothing into a pipe."""
    if not can_redraw(console) or console.color_system is None:
        return
    picture = small_picture(patches, MOST_COLUMNS, MOST_ROWS)
    protocol = protocol_of(os.environ)
    if protocol == "blocks" or "utf" not in console.encoding.lower():
        if console.color_system == "truecolor" and "utf" in console.encoding.lower():
            console.print(half_blocks(picture))
        return
    sequences = {"kitty": kitty, "iterm2": iterm2, "sixel": sixel}[protocol](picture)
    send_picture(console, sequences)


def small_picture(patches: Patches, columns: int, rows: int) -> np.ndarray:
    """uint8 (H, W, 3): the first frame without its padding of whole black rows and columns, so that it fits."""
    _, h, w = patches.grid
    tiles = patches.pixels[: h * w].reshape(h, w, 3, PATCH, PATCH)
    image = tiles.transpose(0, 3, 1, 4, 2).reshape(h * PATCH, w * PATCH, 3)
    scale = max(image.shape[1] / (columns * _CELL[0]), image.shape[0] / (rows * _CELL[1]), 1e-9)
    height, width = (max(int(side / max(scale, 1)), 1) for side in image.shape[:2])
    return image[_centres(image.shape[0], height)][:, _centres(image.shape[1], width)]


def _centres(have: int, want: int) -> np.ndarray:
    return ((np.arange(want) + 0.5) * have / want).astype(int)


def half_blocks(picture: np.ndarray) -> Text:
    """Two pixels a character: the upper one is the letter's colour, the lower one the ground's."""
    height, width = max(picture.shape[0] // (_CELL[1] // 2), 2) // 2 * 2, max(picture.shape[1] // _CELL[0], 1)
    small = picture[_centres(picture.shape[0], height)][:, _centres(picture.shape[1], width)]
    text = Text(no_wrap=True)
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        text.append("  ")
        for top, ground in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*ground)))
        text.append("\n")
    text.rstrip()
    return text


def kitty(picture: np.ndarray) -> Iterator[str]:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol: a PNG, sent and shown, without an answer."""
    data = base64.b64encode(png(picture)).decode()
    chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    for number, chunk in enumerate(chunks):
        head = "a=T,f=100,q=2," if number == 0 else ""
        yield f"\x1b_G{head}m={int(number < len(chunks) - 1)};{chunk}\x1b\\"
    yield "\n"


def iterm2(picture: np.ndarray) -> Iterator[str]:
    """https://iterm2.com/documentation-images.html"""
    data = png(picture)
    size = f"width={picture.shape[1]}px;height={picture.shape[0]}px"
    yield f"\x1b]1337;File=inline=1;size={len(data)};{size}:{base64.b64encode(data).decode()}\x07\n"


def sixel(picture: np.ndarray) -> Iterator[str]:
    """DEC's sixels: bands of six rows, each colour of the band drawn over its whole width."""
    levels = (picture.astype(np.int32) * (_LEVELS - 1) + 127) // 255  # (H, W, 3)
    colours = (levels[..., 0] * _LEVELS + levels[..., 1]) * _LEVELS + levels[..., 2]  # (H, W)
    yield f'\x1bPq"1;1;{picture.shape[1]};{picture.shape[0]}'
    for colour in np.unique(colours).tolist():
        parts = (colour // _LEVELS**2, colour // _LEVELS % _LEVELS, colour % _LEVELS)
        yield f"#{colour};2;" + ";".join(str(round(100 * part / (_LEVELS - 1))) for part in parts)
    for top in range(0, len(colours), 6):
        band = colours[top : top + 6]
        for colour in np.unique(band).tolist():
            bits = ((band == colour) << np.arange(len(band))[:, None]).sum(0)  # (W,)
            yield f"#{colour}" + "".join(chr(63 + bit) for bit in bits.tolist()) + "$"
        yield "-"
    yield "\x1b\\\n"


def png(picture: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a file."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = picture.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows.tobytes()))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")
