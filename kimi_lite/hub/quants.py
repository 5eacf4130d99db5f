"""What a repository offers: its files grouped into models, each with all its shards, under the name that people call
it by: Q4_K_M, UD-Q2_K_XL, smol-IQ1_KT. Only names and sizes are looked at.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.shards import is_model_name, shard_name
from kimi_lite.units import gib

CHECKPOINT = "checkpoint"  # the name of a repository's safetensors, which quantize reads
_TYPE = re.compile(  # of llama.cpp, ik_llama.cpp and their forks, with what publishers put before it
    r"(?<![A-Za-z0-9])((?:(?:UD|smol|i1|pure)[-_.])?"
    r"(?:I?Q\d+(?:_[A-Z0-9]+)*|P?T?Q\d_\d|TQ\d_\d|BF16|F(?:P)?(?:16|32)|[MN][XV]FP4(?:_[A-Z]+)*))(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_BEFORE_TYPE = re.compile(r"^(?:UD|smol|i1|pure)[-_.]", re.IGNORECASE)
_CHECKPOINT_FILES = re.compile(r"[^/]*\.(?:safetensors|json|jinja|model|txt)|LICENSE[^/]*", re.IGNORECASE)
_TOWERS = ("f16", "bf16", "q8_0")  # the order in which a vision tower is taken


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `etag`: its SHA-256 where it is large, else its Git id (SHA-1 of a header and the
    bytes): the name that the hub's cache stores it by."""

    path: str
    num_bytes: int
    etag: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True, slots=True)
class Quant:
    """One model: its shards in order, or a checkpoint's files. `num_shards` is how many there should be."""

    label: str
    files: tuple[RemoteFile, ...]
    num_shards: int

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def is_checkpoint(self) -> bool:
        return self.label == CHECKPOINT

    @property
    def is_whole(self) -> bool:
        return self.is_checkpoint or len(self.files) == self.num_shards

    def require_whole(self) -> None:
        """Raises KimiLiteError where shards are missing in the repository."""
        if not self.is_whole:
            there = ", ".join(str(shard_name(file.name).number) for file in self.files)
            raise KimiLiteError(
                f"{self.label} has {self.num_shards} shards, and the repository holds {len(self.files)} of them "
                f"({there}).",
                "Its publisher may still be uploading: try again later, or take another quant.",
            )


def group(files: Iterable[RemoteFile]) -> tuple[Quant, ...]:
    """The models among the files, from small to large; a checkpoint where there are safetensors with a config.json."""
    files = list(files)
    shards: dict[tuple[str, int], list[RemoteFile]] = {}
    for file in files:
        if is_model_name(file.name):
            name = shard_name(file.name)
            folder = PurePosixPath(file.path).parent
            shards.setdefault((str(folder / name.prefix), name.count), []).append(file)
    labels = _labels([stem for stem, _ in shards])
    quants = [
        Quant(label, tuple(sorted(members, key=lambda file: shard_name(file.name).number)), count)
        for label, ((_, count), members) in zip(labels, shards.items(), strict=True)
    ]
    quants.sort(key=lambda quant: (quant.num_bytes, quant.label))
    paths = {file.path for file in files}
    is_checkpoint = "config.json" in paths and any(re.fullmatch(r"[^/]+\.safetensors", path) for path in paths)
    if is_checkpoint:
        whole = tuple(file for file in files if _CHECKPOINT_FILES.fullmatch(file.path))
        quants.append(Quant(CHECKPOINT, whole, 1))
    return tuple(quants)


def label_of(stem: str) -> str:
    """The type in a name without its shard number and ending, as it is written there; the name itself where it has
    none. The last one counts: `Q4_K_M/Model-F16-Q4_K_M` is Q4_K_M."""
    found = _TYPE.findall(PurePosixPath(stem).name) or _TYPE.findall(stem)
    return found[-1] if found else PurePosixPath(stem).name


def _labels(stems: Sequence[str]) -> list[str]:
    """Of each its type; where two have the same, their whole names."""
    labels = [label_of(stem) for stem in stems]
    folded = [label.lower() for label in labels]
    return [stem if folded.count(label.lower()) > 1 else label for stem, label in zip(stems, labels, strict=True)]


def find_quant(quants: Sequence[Quant], wanted: str, where: str) -> Quant:
    """The one that `wanted` names: its label in any case, with or without UD- and the like where one alone is meant, a
    folder, or a file. Nothing wanted: the only one. Raises KimiLiteError with the list."""
    if not quants:
        raise KimiLiteError(
            f"{where} holds no GGUF file and no safetensors checkpoint.", "Name a repository with one of them."
        )
    if not wanted:
        if len(quants) == 1:
            return quants[0]
        raise KimiLiteError(f"{where} holds {len(quants)} models; name one.", f"{_listed(quants, where)}")
    for is_meant in (_is_label, _is_path, _is_bare_label):
        found = [quant for quant in quants if is_meant(quant, wanted.lower().removesuffix(".gguf"))]
        if len(found) == 1:
            return found[0]
        if found:
            raise KimiLiteError(f"{wanted} names {len(found)} models of {where}.", _listed(found, where))
    raise KimiLiteError(f"{where} holds no {wanted}.", _listed(quants, where))


def find_tower(files: Iterable[RemoteFile], quant: Quant) -> RemoteFile | None:
    """The vision tower that belongs to a model: in its folder or in one above; F16 where there are several."""
    folders = {str(folder) for folder in PurePosixPath(quant.files[0].path).parents}
    towers = [
        file
        for file in files
        if file.name.lower().endswith(".gguf")
        and "mmproj" in file.name.lower()
        and str(PurePosixPath(file.path).parent) in folders
    ]

    def rank(file: RemoteFile) -> tuple[int, int, str]:
        label = label_of(file.name.removesuffix(".gguf")).lower()
        return -file.path.count("/"), _TOWERS.index(label) if label in _TOWERS else len(_TOWERS), file.path

    return min(towers, key=rank, default=None)


def _is_label(quant: Quant, wanted: str) -> bool:
    return quant.label.lower() == wanted


def _is_bare_label(quant: Quant, wanted: str) -> bool:
    return _BEFORE_TYPE.sub("", quant.label.lower()) == wanted or label_of(quant.label).lower() == wanted


def _is_path(quant: Quant, wanted: str) -> bool:
    for file in quant.files:
        path = PurePosixPath(file.path.lower().removesuffix(".gguf"))
        whole = path.with_name(shard_name(f"{path.name}.gguf").prefix)
        if wanted in (str(path), path.name, str(whole), whole.name, str(path.parent)):
            return True
    return False


def _listed(quants: Sequence[Quant], where: str) -> str:
    width = max(len(quant.label) for quant in quants)
    lines = [f"  {quant.label:<{width}} {gib(quant.num_bytes):>12}" for quant in quants]
    return "\n".join([f"kimi-lite pull {where} says which of them fit this machine.", *lines])
