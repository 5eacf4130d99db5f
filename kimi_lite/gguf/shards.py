"""The files of a model: from what the user names (a .gguf file, its first shard, or a folder) to the list of its
shards.

Large models come in shards `PREFIX-00001-of-00007.gguf`. Only names are looked at here; `kimi_lite.gguf.store`, the
caller, then asks every shard whether it belongs.
"""

import re
from pathlib import Path
from typing import NamedTuple

from kimi_lite.errors import KimiLiteError

_SHARD_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PARTIAL_SUFFIXES = (".partial", ".part", ".incomplete", ".crdownload", ".aria2", ".download")
_NOT_MODELS = ("mmproj", "imatrix")  # vision parts and quantization statistics lie next to many models
_MAX_NAMES_SHOWN = 6


def find_shards(path: Path) -> tuple[Path, ...]:
    """Every file of the model at `path`, in order; a one-file model is one shard. Raises KimiLiteError."""
    try:
        if path.is_dir():
            path = _model_in_folder(path)
        elif not path.exists():
            raise _missing_path(path)
        elif not path.is_file():
            raise KimiLiteError(
                f"{path} is neither a file nor a folder.", "Give a .gguf file or a folder that holds one model."
            )
        return _siblings(path)
    except OSError as error:
        raise KimiLiteError(
            f"{path} cannot be read: {error.strerror}.", "Check the path, its permissions and the disk."
        ) from error


class ShardName(NamedTuple):
    """What the name of a file says: `prefix`-0000`number`-of-0000`count`.gguf, counted from 1."""

    prefix: str
    number: int
    count: int


def shard_name(name: str) -> ShardName:
    """1 of 1 for a name that is no shard's."""
    match = _SHARD_NAME.fullmatch(name)
    if match is None:
        return ShardName(name.removesuffix(".gguf"), 1, 1)
    return ShardName(match["prefix"], int(match["number"]), int(match["count"]))


def is_model_name(name: str) -> bool:
    """Whether a file of this name may hold a language model: vision parts and statistics lie next to many."""
    return name.lower().endswith(".gguf") and not any(word in name.lower() for word in _NOT_MODELS)


def _siblings(path: Path) -> tuple[Path, ...]:
    if path.suffix in _PARTIAL_SUFFIXES:
        raise KimiLiteError(f"{path} is a download in progress.", "Wait until it is finished, or start it again.")
    match = _SHARD_NAME.fullmatch(path.name)
    if not match:
        return (path,)
    _, number, count = shard_name(path.name)
    if not 1 <= number <= count:
        hint = "Rename it back to the name that its publisher gave it."
        raise KimiLiteError(f"{path} is named shard {number} of {count}, which cannot be.", hint)
    paths = [path.with_name(f"{match['prefix']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if number != 1:
        raise KimiLiteError(
            f"{path} is shard {number} of {count}, and a model is opened by its first.", f"Open {paths[0]}"
        )
    missing = [shard for shard in paths if not shard.is_file()]
    if missing:
        raise _missing_shards(path, count, missing)
    return tuple(paths)


def _missing_shards(path: Path, count: int, missing: list[Path]) -> KimiLiteError:
    started = [partial.name for shard in missing for partial in _partial_files(shard)]
    hint = f"Fetch them into {path.parent}."
    if started:
        hint = f"A download is in progress ({_listed(started)}): wait until it is finished, or start it again."
    names = _listed([shard.name for shard in missing])
    return KimiLiteError(f"{path} is shard 1 of {count}, and {len(missing)} of them are missing: {names}.", hint)


def _missing_path(path: Path) -> KimiLiteError:
    if partial := _partial_files(path):
        hint = "Wait until it is finished, or start it again."
        return KimiLiteError(f"{path} is not there yet: {partial[0].name} is a download in progress.", hint)
    near = sorted(found.name for found in path.parent.glob("*.gguf")) if path.parent.is_dir() else []
    hint = (
        f"In {path.parent} there is: {_listed(near)}."
        if near
        else "Give a .gguf file or a folder that holds one model."
    )
    return KimiLiteError(f"There is no file or folder {path}.", hint)


def _partial_files(path: Path) -> list[Path]:
    candidates = (path.with_name(path.name + suffix) for suffix in _PARTIAL_SUFFIXES)
    return [candidate for candidate in candidates if candidate.is_file()]


def _model_in_folder(folder: Path) -> Path:
    """The one model in a folder: its file or first shard."""
    models: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        if not is_model_name(path.name):
            continue
        match = _SHARD_NAME.fullmatch(path.name)
        models.setdefault(f"{match['prefix']} of {match['count']}" if match else path.name, path)
    if not models:
        raise _no_model(folder)
    if len(models) > 1:
        names = _listed([path.name for path in models.values()])
        hint = f"Name the one you mean, for example: {next(iter(models.values()))}"
        raise KimiLiteError(f"{folder} holds {len(models)} models, and one is needed: {names}.", hint)
    first = next(iter(models.values()))
    match = _SHARD_NAME.fullmatch(first.name)
    return first.with_name(f"{match['prefix']}-00001-of-{match['count']}.gguf") if match else first


def _no_model(folder: Path) -> KimiLiteError:
    if started := [path.name for path in sorted(folder.iterdir()) if path.suffix in _PARTIAL_SUFFIXES]:
        hint = "Wait until it is finished, or start it again."
        return KimiLiteError(f"{folder} holds no model yet, only downloads in progress: {_listed(started)}.", hint)
    if any(folder.glob("*.safetensors")):
        problem = f"{folder} holds safetensors, and a GGUF file is needed"
        return KimiLiteError(f"{problem}.", f"Make one with: kimi-lite quantize {folder}")
    if below := sorted(str(path) for path in folder.glob("*/*.gguf")):
        return KimiLiteError(
            f"{folder} holds no .gguf file, but its folders do: {_listed(below)}.", "Name one of these folders."
        )
    found = sorted(path.name for path in folder.iterdir())
    return KimiLiteError(
        f"{folder} holds no model: no .gguf file among {len(found)} entries ({_listed(found) or 'it is empty'}).",
        "Give a .gguf file or a folder that holds one model.",
    )


def _listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _MAX_NAMES_SHOWN
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
