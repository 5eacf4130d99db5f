"""The file that `-m` names: a path, the demo where nothing is named; for a model that is only known by name, where it
comes from."""

from collections.abc import Callable
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.units import gib

_SMALL_RECIPE = "tq1_0"  # whose size is named for a model that is not here


def find_model(name: str | None, on_progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Whether there is a model at a path of no known name, its reader says. Raises KimiLiteError."""
    if name is None:
        from kimi_lite.demo.build import ensure_demo_model

        return ensure_demo_model(on_progress)
    require_no_bare_name(name)
    return Path(name).expanduser()


def require_no_bare_name(name: str) -> None:
    """Raises KimiLiteError for the name of a model, as `plan` takes it, in place of a file."""
    if Path(name).expanduser().exists():
        return
    from kimi_lite.arch.known import find_known

    alias = name.rpartition("/")[2].lower()
    known = find_known(alias)
    if known is None:
        return
    from kimi_lite.plan.subject import find_subject

    size = gib(find_subject(alias, has_vision=False).sizes_in(_SMALL_RECIPE).total_bytes)
    repository = name if "/" in name else "REPO"
    raise KimiLiteError(
        f"{name} names {known.config.name}, {known.config.total_parameters / 1e9:,.0f} G parameters; -m wants its file "
        f"or folder.",
        f"1. kimi-lite plan -m {alias}: what of it would run here.\n"
        f"2. Download a GGUF of it, or its checkpoint: hf download {repository} --local-dir FOLDER.\n"
        f"3. kimi-lite quantize FOLDER {alias}.gguf --recipe {_SMALL_RECIPE} makes {size} of the checkpoint, then "
        f"-m {alias}.gguf.",
    )
