"""The configuration file: defaults for the flags of `chat` and `run`, one `flag = value` a line, in TOML.

    model = "~/models/kimi-k2.5"
    ctx = "64K"
    temp = 0.7

A flag on the command line and its twin in the environment come before it. Read by `cli` when a command starts.
"""

import tomllib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import read_text


def read_defaults(path: Path, flags: Mapping[str, str]) -> dict[str, Any]:
    """Parameter name -> value. `flags`: parameter names by long flag without its dashes. No file, no defaults."""
    try:
        settings = tomllib.loads(read_text(path, "The configuration file")) if path.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise KimiLiteError(
            f"The configuration file {path} cannot be read: {error}.", "Fix it or move it away."
        ) from error
    return {_parameter(name, flags, path): _value(name, value, path) for name, value in settings.items()}


def _parameter(name: str, flags: Mapping[str, str], path: Path) -> str:
    flag = name.replace("_", "-")
    if flag not in flags:
        raise KimiLiteError(
            f"{path} sets {name!r}, which is no flag.{_nearest(flag, flags)}", "kimi-lite chat --help lists them."
        )
    return flags[flag]


def _value(name: str, value: object, path: Path) -> object:
    """Paths may begin with ~ as in a shell; tables and dates are nobody's setting."""
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~") else value
    if isinstance(value, bool) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    if isinstance(value, (int, float)):
        return str(value)  # parsed as on the command line
    raise KimiLiteError(
        f"{path} sets {name!r} to a {type(value).__name__}; it must be a text, a number or true or false."
    )


def _nearest(name: str, names: Collection[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""
