"""The headers of a model on a hub, read before anything is downloaded: a few megabytes of the beginning of each shard.
What they say goes through the same checks and into the same plan as a file that is here.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kimi_lite.arch.known import K2_5_TOWER
from kimi_lite.arch.tensors import checked_model
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import cache_folder, whole_file
from kimi_lite.gguf.header import GGUFHeader, read_header
from kimi_lite.gguf.metadata import HeaderGoesOn
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hub.client import Hub, NoAccess, Patience, Repository, Unavailable
from kimi_lite.hub.quants import Quant, RemoteFile
from kimi_lite.plan.subject import Subject, file_subject

_FIRST_BYTES = 1 << 18  # a shard without a vocabulary needs no more
_GROWTH = 6  # then 1.5 MB, then 9: Kimi's vocabulary is 8
_MOST_KEPT = 100  # headers on this disk
_NUM_READERS = 8


class Described(NamedTuple):
    """A quant and what its headers say, or why it cannot be run here."""

    quant: Quant
    subject: Subject | None
    problem: KimiLiteError | None = None


def describe(hub: Hub, repository: Repository, quant: Quant, has_vision: bool = True) -> Subject:
    """Raises KimiLiteError where a header is damaged, of another architecture, or has types that are not known."""
    quant.require_whole()
    headers = [_header(hub, repository, file) for file in quant.files]
    store = GGUFStore.from_headers(tuple(Path(file.name) for file in quant.files), headers)
    tower = repository.tower_of(quant) if has_vision else None
    flag = replace(repository.name, quant=quant.label).flag
    if tower is None:
        return file_subject(checked_model(store), flag)
    return file_subject(checked_model(store), flag, tower.num_bytes, K2_5_TOWER)  # all towers have its body


def describe_all(
    hub: Hub, repository: Repository, quants: Iterable[Quant], on_progress: Callable[[str, int, int], None]
) -> Iterator[Described]:
    """Each in turn, several under way; what is wrong with one does not stop the others. Raises KimiLiteError where the
    hub shows none of them."""
    quants = list(quants)

    def described(quant: Quant) -> Described:
        try:
            return Described(quant, describe(hub, repository, quant))
        except NoAccess:
            raise
        except KimiLiteError as error:
            return Described(quant, None, error)

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for number, found in enumerate(pool.map(described, quants)):
            on_progress("reading headers", number + 1, len(quants))
            yield found


def _header(hub: Hub, repository: Repository, file: RemoteFile) -> GGUFHeader:
    """From the beginning of the file, as much of it as it takes. What was read is kept under the file's checksum."""
    kept = cache_folder() / "headers" / f"{file.etag}.zlib"
    data = _kept(kept)
    is_kept = bool(data)
    data = data or _read(hub, repository, file, 0, min(_FIRST_BYTES, file.num_bytes))
    while True:
        try:
            header = read_header(Path(file.name), memoryview(data), file.num_bytes)
            break
        except HeaderGoesOn as more:
            wanted = max(more.num_bytes, _GROWTH * len(data))
            data += _read(hub, repository, file, len(data), min(wanted, file.num_bytes))
            is_kept = False
    if not is_kept:
        _keep(kept, data)
    return header


def _read(hub: Hub, repository: Repository, file: RemoteFile, start: int, stop: int) -> bytes:
    patience = Patience()
    while True:
        try:
            return hub.read(repository, file, start, stop)
        except Unavailable as failure:
            patience.wait(failure, f"The header of {file.path}")


def _kept(path: Path) -> bytes:
    try:
        return zlib.decompress(path.read_bytes())
    except (OSError, zlib.error):
        return b""


def _keep(path: Path, data: bytes) -> None:
    """On a full disk, or one that cannot be written, it is read again next time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, "wb") as file:
            file.write(zlib.compress(data, 1))
        kept = sorted(path.parent.glob("*.zlib"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_MOST_KEPT]:
            old.unlink(missing_ok=True)
