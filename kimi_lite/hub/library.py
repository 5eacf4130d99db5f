"""The models that are on this machine already, wherever the programs keep them that fetched them; they are used where
they lie.

    Hugging Face cache   $HF_HUB_CACHE, ~/.cache/huggingface/hub: also what `kimi-lite pull` and llama.cpp's -hf fetch
    LM Studio            ~/.lmstudio/models/OWNER/REPO/FILE.gguf
    Ollama               ~/.ollama/models: blobs, named by manifests
    llama.cpp            ~/.cache/llama.cpp: the files of older versions
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from kimi_lite.errors import KimiLiteError
from kimi_lite.hub.cache import UNFINISHED, CachedRepository, cached_repositories
from kimi_lite.hub.names import HubName, is_hub_name, parse_hub_name
from kimi_lite.hub.quants import Quant, RemoteFile, find_quant, find_tower, group

HUB, LM_STUDIO, OLLAMA, LLAMA_CPP = "Hugging Face cache", "LM Studio", "Ollama", "llama.cpp"
_OLLAMA_MODEL, _OLLAMA_TOWER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.projector"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
SERVICE_FOLDER = Path("/usr/share/ollama/.ollama/models")  # of Ollama's Linux service
_MANIFEST_BYTES = 1 << 20  # more is none


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model here: all shards in order. `repository`: OWNER/REPO of the hub, empty where it is of none or not known;
    `label` its quant there. `is_ours`: kimi-lite fetched every file of it."""

    store: str
    repository: str
    label: str
    files: tuple[Path, ...]
    tower: Path | None = None
    is_ours: bool = False
    is_whole: bool = True
    is_checkpoint: bool = False
    traces: tuple[Path, ...] = ()  # files of the store that name it and go with it

    @property
    def path(self) -> Path:
        """What -m names: the file, the first shard, or a checkpoint's folder."""
        return self.files[0].parent if self.is_checkpoint else self.files[0]

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def name(self) -> str:
        """How it is called: OWNER/REPO:QUANT, or the path where it is of no hub."""
        return f"{self.repository}:{self.label}" if self.repository else self.label


def local_models() -> Iterator[LocalModel]:
    """Every store in turn. What cannot be read is left out: it is another program's."""
    yield from _hub_models()
    yield from _lm_studio_models()
    yield from _ollama_models()
    yield from _llama_cpp_models()


def find_local(name: HubName) -> LocalModel | None:
    """The whole model of this name, in any store; without a quant, the only one of its repository that is here. None
    where there is none."""
    models = [
        model for model in _of_revision(name) if model.repository.lower() == name.repository.lower() and model.is_whole
    ]
    quants = {model.label.lower(): model for model in reversed(models)}  # the first store counts
    offered = [_as_quant(model) for model in quants.values()]
    try:
        found = find_quant(offered, name.quant, name.repository)
    except KimiLiteError:
        return None
    return quants[found.label.lower()]


def find_named(text: str) -> LocalModel:
    """The one model that `text` names: as `kimi-lite models` lists it, by its hub name, or by its path. Raises
    KimiLiteError."""
    models = list(local_models())
    path = Path(text).expanduser().absolute()
    same = [model for model in models if text in (model.name, str(model.path)) or path in (*model.files, model.path)]
    if not same and (is_hub_name(text) or "/" in text):
        name = parse_hub_name(text)
        same = [model for model in models if model.repository.lower() == name.repository.lower()]
        if same and name.quant:
            wanted = find_quant([_as_quant(model) for model in same], name.quant, name.repository)
            same = [model for model in same if model.label == wanted.label]
    if not same:
        raise KimiLiteError(f"No model here is called {text!r}.", "kimi-lite models lists those that are here.")
    if len(same) > 1:
        listed = "\n".join(f"  {model.name}  {model.path}" for model in same)
        raise KimiLiteError(f"{len(same)} models here are called {text!r}; name one by its path.", listed)
    return same[0]


def _as_quant(model: LocalModel) -> Quant:
    return Quant(model.label, tuple(RemoteFile(path.name, 0, "") for path in model.files), len(model.files))


def _of_revision(name: HubName) -> Iterable[LocalModel]:
    """A revision is known in the hub's cache alone."""
    if name.revision == "main":
        return local_models()
    cached = CachedRepository.of(name.repository)
    commit = cached.commit_of(name.revision)
    return _models_of(cached, cached.snapshot(commit)) if commit else ()


UNFINISHED_LABEL = "unfinished"


def _hub_models() -> Iterator[LocalModel]:
    """Of each repository the newest snapshot that has a model, and of older ones what it lacks; then what was begun
    there and not ended."""
    for cached in cached_repositories():
        begun = tuple(sorted((cached.folder / "blobs").glob(f"*{UNFINISHED}")))
        if begun:
            is_ours = all("." not in path.name.removesuffix(UNFINISHED) for path in begun)
            yield LocalModel(HUB, cached.name, UNFINISHED_LABEL, begun, is_ours=is_ours, is_whole=False)
        seen = set()
        for snapshot in cached.snapshots():
            for model in _models_of(cached, snapshot):
                if model.label not in seen:
                    seen.add(model.label)
                    yield model


def _models_of(cached: CachedRepository, snapshot: Path) -> Iterator[LocalModel]:
    ours = cached.fetched_by_us
    for model in _in_folder(snapshot, HUB, cached.name):
        paths = [*model.files, *([model.tower] if model.tower else [])]
        is_ours = all(path.resolve().name in ours for path in paths)
        yield replace(model, is_ours=is_ours)


def _in_folder(folder: Path, store: str, repository: str) -> Iterator[LocalModel]:
    """The models in a folder and those below it, grouped as in a repository."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith(UNFINISHED):
            inside = path.relative_to(folder).as_posix()
            found[inside] = RemoteFile(inside, path.stat().st_size, "")
    for quant in group(found.values()):
        tower = find_tower(found.values(), quant)
        files = tuple(folder / file.path for file in quant.files)
        if quant.is_checkpoint:  # the folder is what it is known by
            files = tuple(sorted(files, key=lambda path: path.name != "config.json"))
        yield LocalModel(
            store,
            repository,
            quant.label,
            files,
            folder / tower.path if tower else None,
            is_whole=quant.is_whole and _is_whole_checkpoint(quant, folder),
            is_checkpoint=quant.is_checkpoint,
        )


def _is_whole_checkpoint(quant: Quant, folder: Path) -> bool:
    """Whether the shards that the index names are there; also for what is no checkpoint."""
    index = folder / "model.safetensors.index.json"
    if not quant.is_checkpoint or not index.is_file():
        return True
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(isinstance(name, str) and (folder / name).is_file() for name in names)


def _lm_studio_models() -> Iterator[LocalModel]:
    for root in _lm_studio_folders():
        for folder in sorted(root.glob("*/*")):
            if folder.is_dir():
                yield from _in_folder(folder, LM_STUDIO, "/".join(folder.relative_to(root).parts))


def _lm_studio_folders() -> list[Path]:
    """Its own setting, its folder, and the one that older versions had."""
    home = Path.home()
    homes = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    with suppress(OSError):
        homes.insert(0, Path((home / ".lmstudio-home-pointer").read_text().strip()))
    folders = [base / "models" for base in homes]
    with suppress(OSError, ValueError, KeyError, TypeError):
        folders.insert(0, Path(json.loads((homes[0] / "settings.json").read_bytes())["downloadsFolder"]))
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def ollama_folders() -> list[Path]:
    """$OLLAMA_MODELS, the user's, and that of the Linux service."""
    chosen = os.environ.get("OLLAMA_MODELS")
    folders = [Path(chosen).expanduser()] if chosen else []
    folders += [Path.home() / ".ollama" / "models", SERVICE_FOLDER]
    return [folder for folder in dict.fromkeys(folders) if os.access(folder / "manifests", os.R_OK | os.X_OK)]


def _ollama_models() -> Iterator[LocalModel]:
    for root in ollama_folders():
        for manifest in sorted((root / "manifests").rglob("*")):
            layers = read_manifest(manifest)
            weights = [root / "blobs" / blob for kind, blob in layers if kind == _OLLAMA_MODEL]
            towers = [root / "blobs" / blob for kind, blob in layers if kind == _OLLAMA_TOWER]
            if not weights or not all(os.access(path, os.R_OK) for path in weights):
                continue
            host, *middle, name, tag = manifest.relative_to(root / "manifests").parts
            is_of_hub = host in ("hf.co", "huggingface.co") and len(middle) == 1
            shown = "/".join([*([] if middle == ["library"] else middle), name])
            yield LocalModel(
                OLLAMA,
                f"{middle[0]}/{name}" if is_of_hub else "",
                tag if is_of_hub else f"{shown}:{tag}",
                tuple(weights),
                towers[0] if towers and towers[0].is_file() else None,
                is_whole=len(weights) == 1,  # Ollama's own splits are no shards
                traces=(manifest,),
            )


def read_manifest(path: Path) -> list[tuple[str, str]]:
    """(media type, name of the blob) of each layer; empty for what is no manifest."""
    try:
        if not path.is_file() or path.stat().st_size > _MANIFEST_BYTES:
            return []
        layers = json.loads(path.read_bytes())["layers"]
        found = [(layer["mediaType"], _DIGEST.fullmatch(layer["digest"])) for layer in layers]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [(kind, f"sha256-{digest[1]}") for kind, digest in found if digest]


def _llama_cpp_models() -> Iterator[LocalModel]:
    """Names are OWNER_REPO_FILE.gguf; which underscore divides them, the manifests say where there are some."""
    chosen = os.environ.get("LLAMA_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen).expanduser() if chosen else base / "llama.cpp"
    if not folder.is_dir():
        return
    manifests = [path.name.split("=") for path in folder.glob("manifest=*=*=*.json")]
    repositories = {f"{owner}_{repository}_": f"{owner}/{repository}" for _, owner, repository, _ in manifests}
    for model in _in_folder(folder, LLAMA_CPP, ""):
        known = next((name for start, name in repositories.items() if model.path.name.startswith(start)), "")
        traces = [Path(f"{file}{ending}") for file in model.files for ending in (".etag", ".json")]
        yield replace(
            model,
            repository=known,
            label=model.label if known else PurePosixPath(model.path.name).stem,
            tower=model.tower if known else None,
            traces=tuple(path for path in traces if path.is_file()),
        )


def same_bytes(repository_files: Sequence[RemoteFile], model: LocalModel) -> bool:
    """Whether a model here has the sizes of what a repository offers now: else it is of another revision."""
    sizes = [file.num_bytes for file in repository_files]
    return model.is_whole and [path.stat().st_size for path in model.files] == sizes
