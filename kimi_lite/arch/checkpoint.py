"""config.json of a Hugging Face checkpoint: the text model's fields, whether nested or not, checked and completed.

What a missing field means is what the model's own code does; what the GGUF architecture cannot express is refused here,
before any weight is read. Which fields there are, and of which model types, is in the architectures' tables.

    checkpoint = read_checkpoint_config(Path("Kimi-K2.5"))
    checkpoint.config.num_layers
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kimi_lite.arch.architecture import Architecture, architectures
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.reader import Reader, shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import require_no_pointer

_MAX_JSON_BYTES = 256 << 20  # far beyond what exists: Kimi's index has 8 MB
_DOWNLOAD_HINT = "Download it again."


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """A checkpoint's `config`, and all `fields` of its text model for what is no number of the architecture (its
    quantization, control ids); `outer` is the file as it stands, with vision_config."""

    file: Path
    config: ModelConfig
    fields: Mapping[str, object]
    outer: Mapping[str, object]

    def object(self, field: str) -> Mapping[str, object]:
        """A field that holds an object; empty where it is missing. Raises KimiLiteError."""
        return inner_object(self.fields, field, str(self.file))

    @property
    def vision(self) -> Mapping[str, object]:
        """`vision_config`, empty where there is none. Raises KimiLiteError."""
        return inner_object(self.outer, "vision_config", str(self.file))


def read_checkpoint_config(folder: Path) -> CheckpointConfig:
    """Raises KimiLiteError where config.json is missing, of another family, or not expressible."""
    file = folder / "config.json"
    if not file.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise KimiLiteError(
            f"{folder} {what}.", "Name the folder of a Hugging Face checkpoint: config.json, weights, tokenizer."
        )
    outer = read_json_object(file)
    inner = inner_object(outer, "text_config", str(file))
    architecture, defaults = _find_architecture(file, outer, inner)
    stated = {**outer, **inner}
    fields = {**defaults, **{field: value for field, value in stated.items() if value is not None}}
    _check_expressible(file, architecture, fields)
    name = _printable(fields.get("_name_or_path")) or folder.resolve().name
    config = ModelConfig.from_json(fields, architecture, name, str(file), _family_hint())
    return CheckpointConfig(file, config, fields, outer)


def read_json_object(file: Path, hint: str = _DOWNLOAD_HINT) -> dict[str, object]:
    """The object in a JSON file in UTF-8, with or without a byte order mark. Raises KimiLiteError."""
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise KimiLiteError(f"{file} has {file.stat().st_size:,} bytes, too many for such a file.", hint)
        data = file.read_bytes()
        require_no_pointer(file, data)
        content = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise KimiLiteError(f"{file} cannot be read: {error.strerror}.", hint) from error
    except (ValueError, RecursionError) as error:
        raise KimiLiteError(f"{file} is not JSON: {_printable(str(error))}.", hint) from error
    if not isinstance(content, dict):
        raise KimiLiteError(f"{file} holds {_kind(content)}, and must hold an object.", hint)
    return content


def inner_object(content: Mapping[str, object], field: str, source: str, hint: str = _DOWNLOAD_HINT) -> Mapping:
    """A field that holds an object; empty where it is missing or null. Raises KimiLiteError."""
    value = content.get(field)
    if value is not None and not isinstance(value, dict):
        raise KimiLiteError(f"{source}: {field} is {shown(value)}, and must be an object.", hint)
    return value or {}


def _kind(content: object) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(content), "a number")


def _printable(value: object) -> str:
    return "".join(filter(str.isprintable, value))[:200] if isinstance(value, str) else ""


def _find_architecture(
    file: Path, outer: Mapping[str, object], inner: Mapping[str, object]
) -> tuple[Architecture, Mapping[str, object]]:
    """The table of the model type, and what missing fields mean there."""
    kind, inner_kind = outer.get("model_type"), inner.get("model_type", outer.get("model_type"))
    for known in architectures():
        is_wrapped = kind in known.wrappers
        if isinstance(inner_kind, str) and inner_kind in known.model_types and (is_wrapped or kind == inner_kind):
            return known, known.model_types[inner_kind]
    named = shown(kind) if kind == inner_kind else f"{shown(kind)} around {shown(inner_kind)}"
    raise KimiLiteError(f"{file} is a model of type {named}.", _family_hint())


def _family_hint() -> str:
    return f"{'; '.join(known.family for known in architectures())} can be converted."


def _check_expressible(file: Path, architecture: Architecture, fields: Mapping[str, object]) -> None:
    """Raises KimiLiteError for what the architecture's GGUF file has no key for."""
    num_groups = Reader(fields, "", str(file), _family_hint(), is_null_missing=True).integer("n_group", 0, 1 << 20, 1)
    refused = [field for field, allowed in architecture.fixed.items() if fields.get(field, allowed[0]) not in allowed]
    if fields.get("topk_method") == "group_limited_greedy" and num_groups > 1:
        refused.append("topk_method")
    for field in refused:
        raise KimiLiteError(
            f"{file} has {field} = {shown(fields[field])}, which a {architecture.name} GGUF cannot say.",
            _family_hint(),
        )
