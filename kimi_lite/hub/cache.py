"""The cache that the hub's programs share, and llama.cpp's `-hf` with them: where a file of a repository lies there.

    models--OWNER--REPO/blobs/ETAG                       the bytes, under their checksum
    models--OWNER--REPO/snapshots/COMMIT/PATH            links to them, under their names
    models--OWNER--REPO/refs/main                        the commit that `main` was when it was last asked
    models--OWNER--REPO/kimi-lite.json                   ours: the checksums of what kimi-lite fetched

The layout is huggingface_hub's (its guide "Understand caching"); it is read here without that library.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import whole_file
from kimi_lite.hub.names import HubName
from kimi_lite.hub.quants import RemoteFile

_PREFIX = "models--"
_OURS = "kimi-lite.json"
UNFINISHED = ".incomplete"  # how names of blobs end that are being fetched


def hub_cache() -> Path:
    """$HF_HUB_CACHE, or `hub` in $HF_HOME, or in ~/.cache/huggingface ($XDG_CACHE_HOME counts)."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if chosen := os.environ.get(variable):
            return Path(os.path.expandvars(chosen)).expanduser()
    home = os.environ.get("HF_HOME")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    return (Path(os.path.expandvars(home)).expanduser() if home else base) / "hub"


@dataclass(frozen=True, slots=True)
class CachedRepository:
    """The folder of a repository; it need not exist."""

    folder: Path

    @classmethod
    def of(cls, repository: str, cache: Path | None = None) -> "CachedRepository":
        return cls((cache or hub_cache()) / f"{_PREFIX}{repository.replace('/', '--')}")

    @property
    def name(self) -> str:
        """OWNER/REPO"""
        return self.folder.name.removeprefix(_PREFIX).replace("--", "/", 1)

    def blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / file.etag

    def unfinished(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / f"{file.etag}{UNFINISHED}"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def lock(self, file: RemoteFile) -> Path:
        """The one that huggingface_hub takes for the same file."""
        return self.folder.parent / ".locks" / self.folder.name / f"{file.etag}.lock"

    def has(self, commit: str, file: RemoteFile) -> bool:
        """Whether the file is there whole, under its name in the snapshot or as a blob."""
        link = self.snapshot(commit) / file.path
        return any(path.is_file() and path.stat().st_size == file.num_bytes for path in (link, self.blob(file)))

    def link(self, commit: str, file: RemoteFile) -> Path:
        """The file under its name in the snapshot, which is made where it is missing."""
        link, blob = self.snapshot(commit) / file.path, self.blob(file)
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)  # a link to what is gone
            try:
                link.symlink_to(os.path.relpath(blob, link.parent))
            except OSError:  # a file system without links: the hub's library moves the file there, too
                os.replace(blob, link)
        return link

    def commit_of(self, revision: str) -> str | None:
        """The commit that the revision was when it was last asked, or the revision itself where it is one."""
        if (self.snapshot(revision)).is_dir():
            return revision
        try:
            commit = (self.folder / "refs" / revision).read_text().strip()
        except OSError:
            return None
        return commit if commit and self.snapshot(commit).is_dir() else None

    def set_commit(self, revision: str, commit: str) -> None:
        if revision == commit:
            return
        path = self.folder / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(commit)

    def snapshots(self) -> list[Path]:
        """The newest first; that of `main` before all."""
        main = self.commit_of("main")
        found = [path for path in (self.folder / "snapshots").glob("*") if path.is_dir()]
        return sorted(found, key=lambda path: (path.name != main, -path.stat().st_mtime))

    @property
    def fetched_by_us(self) -> frozenset[str]:
        """The etags of what kimi-lite fetched here."""
        try:
            return frozenset(json.loads((self.folder / _OURS).read_text())["etags"])
        except (OSError, ValueError, KeyError, TypeError):
            return frozenset()

    def set_fetched_by_us(self, etags: frozenset[str]) -> None:
        path = self.folder / _OURS
        if etags:
            with whole_file(path) as file:
                json.dump({"etags": sorted(etags)}, file)
        else:
            path.unlink(missing_ok=True)


def cached_repositories() -> Iterator[CachedRepository]:
    for folder in sorted(hub_cache().glob(f"{_PREFIX}*--*")):
        if folder.is_dir():
            yield CachedRepository(folder)


def is_offline() -> bool:
    """What the hub's own programs go by."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def require_online(name: HubName) -> None:
    if is_offline():
        raise KimiLiteError(
            f"{name} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub.",
            "Unset HF_HUB_OFFLINE, or name a model that `kimi-lite models` lists.",
        )
