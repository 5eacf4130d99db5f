"""Values of a file, read key by key and never believed: missing, of the wrong type or absurd is one sentence.

GGUF metadata and config.json are both such mappings; `quantize` reads a checkpoint's other JSON files so too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kimi_lite.errors import KimiLiteError

METADATA_HINT = (
    "Its metadata is damaged or from an unknown converter: fetch the file again, or make it with kimi-lite quantize."
)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads keys below `prefix` ("deepseek2."); `source` names the file and starts every sentence."""

    values: Mapping[str, object]
    prefix: str
    source: str
    hint: str = METADATA_HINT
    is_null_missing: bool = False  # JSON's null

    def has(self, key: str) -> bool:
        return not (self.prefix + key not in self.values or (self.is_null_missing and self.values[key] is None))

    def integer(self, key: str, low: float, high: float, default: int | None = None) -> int:
        """A whole number from `low` to `high`. An array of equal numbers (one for each layer) is that number."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, value, f"a whole number from {low:,} to {high:,}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from `low` to `high`."""
        value = self.value(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not -math.inf < value < math.inf or not low <= value <= high:
            raise self.error(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Mapping, default: object = None) -> object:
        """What `choices` holds for the value."""
        value = self.value(key, default)
        if not isinstance(value, (str, int)) or value not in choices:
            known = (
                str(choice) if choice == meaning else f"{choice} ({meaning})" for choice, meaning in choices.items()
            )
            raise self.error(key, value, f"one of {', '.join(known)}")
        return choices[value]

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a text")
        return value

    def error(self, key: str, value: object, need: str) -> KimiLiteError:
        """`key` holds `value`, and must be `need`."""
        return KimiLiteError(f"{self.source}: {self.prefix}{key} is {shown(value)}, and must be {need}.", self.hint)

    def value(self, key: str, default: object = None) -> object:
        value = self.values[self.prefix + key] if self.has(key) else default
        if value is None:
            what = "lacks" if self.is_null_missing else "the metadata key"
            sentence = f"{what} {key}" if self.is_null_missing else f"{what} {self.prefix}{key} is missing"
            raise KimiLiteError(f"{self.source}: {sentence}.", self.hint)
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.size and (value == value[0]).all():
            return value[0].item()
        return value


def shown(value: object) -> str:
    """A value from a file as it may be printed: short, control characters escaped."""
    text = repr(value[:80]) if isinstance(value, str) else str(value)[:80].replace("\n", " ")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
