"""`--check-source`: a checkpoint's files against the SHA-256 that their repository states, before hours are spent on
them.

A flipped bit in a header is always found, one in a weight is not: safetensors has no checksums. Hugging Face's
downloader leaves them next to the files, in either of its layouts: `hf download --local-dir` writes
`.cache/huggingface/download/NAME.metadata` with the hash in its second line, and its shared cache names the file itself
after it. A file SHA256SUMS is read too.
"""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.host import usable_cores
from kimi_lite.quantize.write.writer import OnProgress
from kimi_lite.units import gib

_BLOCK_BYTES = 16 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_source(folder: Path, on_progress: OnProgress | None = None) -> str:
    """Reads every .safetensors file; returns a line for the user. Raises KimiLiteError for a file that differs, and
    where no checksum is known for some."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise KimiLiteError(
            f"{folder} has no .safetensors files to check.", "--check-source is for Hugging Face checkpoints."
        )
    wanted = {file: find_checksum(file) for file in files}
    unknown = [file.name for file, checksum in wanted.items() if checksum is None]
    if unknown:
        raise KimiLiteError(
            f"No checksum is known for {len(unknown)} of {len(files)} files, the first is {unknown[0]}.",
            "Download with `hf download --local-dir`, which leaves them, or put a SHA256SUMS file next to the weights.",
        )
    total = sum(file.stat().st_size for file in files)
    report, done = on_progress or (lambda name, done, total: None), 0
    with ThreadPoolExecutor(usable_cores().most_threads) as pool:
        for file, found in zip(files, pool.map(_hash, files), strict=True):
            if found != wanted[file]:
                raise KimiLiteError(
                    f"{file} is damaged: need SHA-256 {wanted[file]}, have {found}.",
                    "Delete that file and download it again.",
                )
            done += file.stat().st_size
            report(f"checking {file.name}", done, total)
    return f"{len(files)} source files, {gib(total)}: all checksums equal"


def find_checksum(file: Path) -> str | None:
    """What the file's SHA-256 should be, where that is stated."""
    candidates = [file.resolve().name]
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if metadata.is_file():
        candidates += metadata.read_text(encoding="utf-8", errors="replace").splitlines()[1:2]
    sums = file.parent / "SHA256SUMS"
    if sums.is_file():
        lines = (line.split() for line in sums.read_text(encoding="utf-8", errors="replace").splitlines())
        candidates += [parts[0].lower() for parts in lines if len(parts) == 2 and parts[1].lstrip("*") == file.name]
    return next((candidate for candidate in candidates if _SHA256.fullmatch(candidate)), None)


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
