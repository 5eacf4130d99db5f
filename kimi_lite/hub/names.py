"""Models by their names on a hub, as people write them.

hf:unsloth/Kimi-K2.5-GGUF:UD-TQ1_0            what -m takes
unsloth/Kimi-K2.5-GGUF:UD-TQ1_0               what `pull` takes too
hf.co/unsloth/Kimi-K2.5-GGUF:UD-TQ1_0         what Ollama takes
https://huggingface.co/unsloth/Kimi-K2.5-GGUF/tree/main/UD-TQ1_0        copied from a browser
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kimi_lite.errors import KimiLiteError
from kimi_lite.options import HUB_PREFIX

_HOSTS = ("hf.co", "huggingface.co", "www.huggingface.co")
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?(?::(?P<quant>[\w.+ /-]+))?", re.ASCII)
_HINT = "Names are OWNER/REPO or OWNER/REPO:QUANT, as hf:unsloth/Kimi-K2.5-GGUF:UD-TQ1_0."


@dataclass(frozen=True, slots=True)
class HubName:
    """`quant`: a type, a folder or a file of the repository, empty where none is named; `revision`: a branch, a tag or
    a commit."""

    repository: str
    quant: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repository}{revision}{self.quant and f':{self.quant}'}"

    @property
    def flag(self) -> str:
        """As -m takes it."""
        return f"{HUB_PREFIX}{self}"


def is_hub_name(text: str) -> bool:
    """Whether what -m names can only be a model of a hub."""
    return text.startswith((HUB_PREFIX, "http://", "https://")) or text.partition("/")[0] in _HOSTS


def parse_hub_name(text: str) -> HubName:
    """A name with or without its prefix, or an address. Raises KimiLiteError."""
    bare = text.removeprefix(HUB_PREFIX).strip()
    if "://" in bare:
        return _from_address(bare)
    host, _, rest = bare.partition("/")
    match = _NAME.fullmatch((rest if host in _HOSTS else bare).rstrip("/"))
    if match is None or _climbs(match["quant"] or "") or _climbs(match["revision"] or ""):
        raise KimiLiteError(f"{text!r} is no name of a model on a hub.", _HINT)
    return HubName(match["repository"], match["quant"] or "", match["revision"] or "main")


def looks_like_hub_name(text: str) -> bool:
    """Whether what names no file here may be a model of a hub without its prefix: OWNER/REPO and a quant, or a
    repository of GGUF files."""
    match = _NAME.fullmatch(text)
    return match is not None and Path(text).suffix != ".gguf" and bool(match["quant"] or "gguf" in text.lower())


def _from_address(text: str) -> HubName:
    """Of a page or a file. The host says nothing: mirrors have the same paths, HF_ENDPOINT chooses one."""
    path, _, quant = unquote(urlsplit(text).path).strip("/").partition(":")
    owner, _, rest = path.partition("/")
    repository, _, rest = rest.partition("/")
    if not rest:
        return parse_hub_name(f"{owner}/{repository}{quant and f':{quant}'}")
    kind, _, rest = rest.partition("/")
    revision, _, inside = rest.partition("/")
    if kind not in ("tree", "blob", "resolve") or not revision:
        raise KimiLiteError(f"{text!r} is no address of a model on a hub.", _HINT)
    return parse_hub_name(f"{owner}/{repository}@{revision}{inside and f':{inside}'}")


def _climbs(path: str) -> bool:
    return any(part in ("", ".", "..") for part in path.split("/")) if path else False
