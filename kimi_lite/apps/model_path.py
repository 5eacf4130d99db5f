"""The file that `-m` names: a path, or the demo where nothing is named."""

from collections.abc import Callable
from pathlib import Path

from kimi_lite.plan.subject import require_no_bare_name


def find_model(name: str | None, on_progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Whether there is a model at a path, its reader says. Raises KimiLiteError for a name as `plan` takes it."""
    if name is None:
        from kimi_lite.demo.build import ensure_demo_model

        return ensure_demo_model(on_progress)
    require_no_bare_name(name)
    return Path(name).expanduser()
