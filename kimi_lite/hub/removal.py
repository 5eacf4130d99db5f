"""Deleting a model that is here: its files, what names them in its store, and the folders that are empty then."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.hub.cache import CachedRepository, hub_cache
from kimi_lite.hub.library import HUB, OLLAMA, LocalModel, local_models, read_manifest


@dataclass(frozen=True, slots=True)
class Removal:
    """`files` are deleted, links and what they lead to; `num_bytes` become free."""

    model: LocalModel
    files: tuple[Path, ...]
    num_bytes: int

    def run(self) -> None:
        """Raises KimiLiteError."""
        try:
            for file in self.files:
                file.unlink(missing_ok=True)
            for folder in dict.fromkeys(file.parent for file in self.files):
                _remove_empty(folder)
            if self.model.store == HUB:
                _tidy(CachedRepository.of(self.model.repository))
        except OSError as error:
            hint = "ollama rm NAME deletes what Ollama's service owns." if self.model.store == OLLAMA else ""
            raise KimiLiteError(f"{error.filename} cannot be deleted: {error.strerror}.", hint) from error


def plan_removal(model: LocalModel, is_forced: bool) -> Removal:
    """Raises KimiLiteError where another program fetched the model, unless that is forced."""
    if not (model.is_ours or is_forced):
        raise KimiLiteError(
            f"{model.name} was not fetched by kimi-lite: it lies in {_owner(model)}, and that program may use it.",
            "Delete it there, or add --force.",
        )
    others = [other for other in local_models() if other.files != model.files]
    kept = {path for other in others for path in (*other.files, other.tower) if path}
    blobs = {_target(path) for path in kept}
    mine = [path for path in (*model.files, model.tower) if path and path not in kept]
    files = dict.fromkeys(mine)
    files.update(dict.fromkeys(_target(path) for path in mine if path.is_symlink() and _target(path) not in blobs))
    if model.store == OLLAMA:
        files = {path: None for path in files if path not in _ollama_blobs_of_others(model)}
    files.update(dict.fromkeys(model.traces))
    num_bytes = sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())
    return Removal(model, tuple(files), num_bytes)


def _target(path: Path) -> Path:
    """What a link names, and not where that may lead in turn: to a store that several caches share."""
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path


def _owner(model: LocalModel) -> str:
    return f"the {model.store}" if model.store == HUB else f"{model.store}'s folder"


def _ollama_blobs_of_others(model: LocalModel) -> set[Path]:
    """Ollama's models share blobs."""
    (manifest,) = model.traces
    root = model.files[0].parents[1]
    others = (path for path in (root / "manifests").rglob("*") if path != manifest)
    return {root / "blobs" / blob for path in others for _, blob in read_manifest(path)}


def _remove_empty(folder: Path) -> None:
    """The folder and those above it that have nothing left in them, but no store's own."""
    with suppress(OSError):  # it has something in it
        while folder != hub_cache() and folder.parent != folder and len(folder.parts) > len(Path.home().parts) + 2:
            folder.rmdir()
            folder = folder.parent


def _tidy(cached: CachedRepository) -> None:
    """What a repository's folder says about files that are gone."""
    blobs = {path.name for path in (cached.folder / "blobs").glob("*")}
    if not cached.folder.is_dir():
        return
    cached.set_fetched_by_us(frozenset(cached.fetched_by_us & blobs))
    for ref in _files_below(cached.folder / "refs"):
        if cached.commit_of(ref.relative_to(cached.folder / "refs").as_posix()) is None:
            ref.unlink()
            _remove_empty(ref.parent)
    if not blobs and not any((cached.folder / "snapshots").glob("*/*")):
        for path in _files_below(cached.folder):
            path.unlink()
        _remove_folders(cached.folder)


def _files_below(folder: Path) -> Iterable[Path]:
    return [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]


def _remove_folders(folder: Path) -> None:
    for base, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(base)
