"""From a hub's name to files: those that are here, or those that are fetched now."""

from collections.abc import Callable, Iterable
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.hub.client import Hub, Repository
from kimi_lite.hub.fetch import fetch, missing
from kimi_lite.hub.headers import describe
from kimi_lite.hub.library import LocalModel, find_local, local_models, same_bytes
from kimi_lite.hub.names import parse_hub_name
from kimi_lite.hub.quants import Quant, RemoteFile
from kimi_lite.options import Options
from kimi_lite.plan.subject import Subject
from kimi_lite.units import gib

OnProgress = Callable[[str, int, int], None]


def find_or_fetch(text: str, options: Options, on_progress: OnProgress) -> Path:
    """The model's file or its first shard. A quant that would not run here is refused before it
    is fetched. Raises KimiLiteError."""
    name = parse_hub_name(text)
    if local := find_local(name):
        return local.path
    with Hub() as hub:
        repository = hub.repository(name)
        quant = repository.find(name.quant)
        if quant.is_checkpoint:
            raise KimiLiteError(
                f"{name.repository} is a checkpoint of {gib(quant.num_bytes)}, and GGUF is needed to run it.",
                f"1. kimi-lite pull {name}\n2. kimi-lite quantize FOLDER OUT.gguf --recipe RECIPE, then -m OUT.gguf.",
            )
        if local := same_here(repository, quant, local_models()):
            return local.path
        can_see = options.vision != "off"
        subject = describe(hub, repository, quant, can_see)
        require_runnable(subject, options, missing(repository, quant.files).num_bytes)
        return fetch_quant(hub, repository, quant, on_progress, can_see)


def find_here(text: str) -> Path:
    """Without a download. Raises KimiLiteError for what is not here."""
    name = parse_hub_name(text)
    local = find_local(name)
    if local is None:
        raise KimiLiteError(f"{name} is not on this machine.", f"kimi-lite pull {name}")
    return local.path


def find_hub_subject(text: str, has_vision: bool = True) -> Subject:
    """What a plan is about: the model here, or its headers on the hub. Raises KimiLiteError."""
    from kimi_lite.plan.subject import find_subject

    name = parse_hub_name(text)
    if local := find_local(name):
        return find_subject(str(local.path), has_vision)
    with Hub() as hub:
        repository = hub.repository(name)
        quant = repository.find(name.quant)
        if quant.is_checkpoint:
            raise KimiLiteError(
                f"{name.repository} is a checkpoint: what of it would run depends on its types to be.",
                f"kimi-lite pull {name}, then: kimi-lite plan -m FOLDER.",
            )
        return describe(hub, repository, quant, has_vision)


def fetch_quant(
    hub: Hub, repository: Repository, quant: Quant, on_progress: OnProgress, has_vision: bool = True
) -> Path:
    """All files of a model, with its vision tower where it has one and that is wanted. Raises KimiLiteError."""
    quant.require_whole()
    tower = repository.tower_of(quant) if has_vision else None
    paths = fetch(hub, repository, [*quant.files, *([tower] if tower else [])], on_progress)
    return paths[0].parent if quant.is_checkpoint else paths[0]


def require_runnable(subject: Subject, options: Options, download_bytes: int) -> None:
    """Raises KimiLiteError where the plan refuses the model."""
    from kimi_lite.hardware.probe import probe
    from kimi_lite.hub.cache import hub_cache
    from kimi_lite.plan.plan import make_plan

    assert subject.sizes is not None
    make_plan(subject.sizes, probe(hub_cache()), options, file_bytes=download_bytes).require()


def same_here(repository: Repository, quant: Quant, models: Iterable[LocalModel]) -> LocalModel | None:
    """The same model among those that are here, whichever program keeps it: with the same checksum, or of the same name
    and sizes."""
    digests = [file.etag for file in quant.files]
    for model in models:
        names = [path.resolve().name.removeprefix("sha256-") for path in model.files]
        is_named = model.repository.lower() == repository.name.repository.lower() and _is_label(model, quant.files)
        if names == digests or (is_named and same_bytes(quant.files, model)):
            return model
    return None


def _is_label(model: LocalModel, files: tuple[RemoteFile, ...]) -> bool:
    """By the names of the files; Ollama's have none."""
    return all(path.name.endswith(file.name) for path, file in zip(model.files, files, strict=False))
