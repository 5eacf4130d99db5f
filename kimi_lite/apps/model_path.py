"""The file that `-m` names: a path, a model of a hub, or the demo where nothing is named."""

from collections.abc import Callable
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.hub.names import is_hub_name, looks_like_hub_name
from kimi_lite.options import HUB_PREFIX, Options
from kimi_lite.plan.subject import require_no_bare_name

OnProgress = Callable[[str, int, int], None]


def find_model(options: Options, on_progress: OnProgress | None = None, downloads: bool = True) -> Path:
    """Whether there is a model at a path, its reader says. A model of a hub is fetched where it is not here yet and it
    `downloads`. Raises KimiLiteError for a name as `plan` takes it, and for what would not run here."""
    name = options.model
    if name is None:
        from kimi_lite.demo.build import ensure_demo_model

        return ensure_demo_model(on_progress)
    require_model_name(name)
    if is_hub_name(name):
        from kimi_lite.hub.resolve import find_here, find_or_fetch

        if options.is_offline or not downloads:
            return find_here(name)
        return find_or_fetch(name, options, on_progress or (lambda what, done, total: None))
    return Path(name).expanduser()


def require_model_name(name: str) -> None:
    """Raises KimiLiteError for the name of a model in place of its file, where no file has it."""
    if is_hub_name(name):
        return
    if looks_like_hub_name(name) and not Path(name).expanduser().exists():
        raise KimiLiteError(f"There is no file or folder {name}.", f"A model of a hub: -m {HUB_PREFIX}{name}")
    require_no_bare_name(name)
