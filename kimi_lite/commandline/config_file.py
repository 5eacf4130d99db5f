"""The configuration file: defaults for the options of every command, one `option = value` a line, in TOML.

    model = "~/models/kimi-k2.5"
    ctx = "64K"
    temp = 0.7

Options are called as their long flags. A flag on the command line and the variable of the environment go before the
file. Read by `commandline.flags` when a command starts.
"""

import os
import re
import tomllib
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_config_path

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import read_text
from kimi_lite.options import OPTIONS


def config_path() -> Path:
    """$KIMI_LITE_CONFIG, or config.toml in the platform's configuration folder (XDG_CONFIG_HOME counts)."""
    chosen = os.environ.get("KIMI_LITE_CONFIG")
    return Path(chosen).expanduser() if chosen else user_config_path("kimi-lite") / "config.toml"


class Setting(NamedTuple):
    """A value of the file, and the line it came from for error messages."""

    value: object
    source: str


def read_settings(path: Path) -> dict[str, Setting]:
    """By the names of `Options`' fields. No file, no settings. Raises KimiLiteError."""
    try:
        text = read_text(path, "The configuration file") if path.exists() else ""
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise KimiLiteError(
            f"The configuration file {path} cannot be read: {error}.", "Fix it or move it away."
        ) from error
    return {
        field: Setting(_value(name, value, path), _source(name, text, path))
        for name, value in values.items()
        for field in _fields(name, path)
    }


def _fields(name: str, path: Path) -> list[str]:
    """Several where commands share a flag's name: each command takes its own."""
    found = [option for option in OPTIONS.values() if option.key == name.replace("_", "-")]
    if not found:
        near = _nearest(name.replace("_", "-"), [each.key for each in OPTIONS.values() if each.is_setting])
        raise KimiLiteError(f"{path} sets {name!r}, which is not an option.{near}", "kimi-lite chat --help lists them.")
    if not any(option.is_setting for option in found):
        raise KimiLiteError(f"{path} sets {name!r}, which can only be given on the command line.", "Remove the line.")
    return [option.name for option in found if option.is_setting]


def _value(name: str, value: object, path: Path) -> object:
    """Tables and dates are no option's values; what the option makes of the others, `Option.parse` says."""
    if isinstance(value, (str, bool, int, float, list)):
        return value
    raise KimiLiteError(
        f"{path} sets {name!r} to a {type(value).__name__}; it must be a text, a number, a list, or true or false."
    )


def _source(name: str, text: str, path: Path) -> str:
    pattern = re.compile(rf"""\s*["']?{re.escape(name)}["']?\s*=""")
    numbers = [number for number, line in enumerate(text.splitlines(), start=1) if pattern.match(line)]
    return f"{name} in {path}" + (f" (line {numbers[0]})" if numbers else "")


def _nearest(name: str, names: Collection[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""
