"""An image from the clipboard, by the program that this desktop has for it.

A terminal hands over text only (OSC 52 too), so the image comes from wl-paste, xclip, pngpaste or PowerShell. Over ssh
there is none of them: the clipboard is on the other machine.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from kimi_lite.errors import KimiLiteError
from kimi_lite.media.medium import MAX_IMAGE_BYTES

_WAIT_S = 10.0
_POWERSHELL = (
    "Add-Type -AssemblyName System.Windows.Forms; $i = [Windows.Forms.Clipboard]::GetImage(); if ($i) { "
    "$m = New-Object IO.MemoryStream; $i.Save($m, [Drawing.Imaging.ImageFormat]::Png); "
    "$o = [Console]::OpenStandardOutput(); $o.Write($m.ToArray(), 0, $m.Length) }"
)


def clipboard_image(max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The image's file, as PNG. KimiLiteError where there is none, or nothing that could read it."""
    commands = list(_commands())
    if not commands:
        where = "over ssh the clipboard is on the other machine" if "SSH_CONNECTION" in os.environ else "none is here"
        raise KimiLiteError(
            f"To read an image from the clipboard, wl-paste, xclip or pngpaste is needed; {where}.",
            "Save it as a file and use /image FILE, or drop the file into the prompt.",
        )
    for command in commands:
        data = _output(command)
        if len(data) > max_bytes:
            raise KimiLiteError(f"The clipboard's image has {len(data):,} bytes; {max_bytes:,} can be read.")
        if data:
            return data
    raise KimiLiteError("There is no image in the clipboard.", "Copy one first, or use /image FILE.")


def _commands() -> Iterator[list[str]]:
    """What may be there, the likeliest first."""
    if "WAYLAND_DISPLAY" in os.environ and shutil.which("wl-paste"):
        yield ["wl-paste", "--no-newline", "--type", "image/png"]
    if "DISPLAY" in os.environ and shutil.which("xclip"):
        yield ["xclip", "-selection", "clipboard", "-target", "image/png", "-out"]
    if sys.platform == "darwin" and shutil.which("pngpaste"):
        yield ["pngpaste", "-"]
    if "WSL_DISTRO_NAME" in os.environ and shutil.which("powershell.exe"):
        yield ["powershell.exe", "-NoProfile", "-STA", "-Command", _POWERSHELL]


def _output(command: list[str]) -> bytes:
    """What it writes, nothing where it fails."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_WAIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""
