"""Which models a server has, as its `/models` says, and which of them is meant."""

from collections.abc import Mapping
from typing import Any

from kimi_lite.apps.remote.endpoint import Refused
from kimi_lite.errors import KimiLiteError

MODELS = "/models"
CONTEXT_KEYS = ("max_model_len", "context_length", "context_window", "n_ctx")

Models = Mapping[str, Mapping[str, Any]]  # what the server says about each, by name


def models_of(document: Any) -> Models:
    """Of what `/models` answers."""
    entries = document.get("data") if isinstance(document, Mapping) else None
    entries = entries if isinstance(entries, list) else []
    return {str(entry["id"]): entry for entry in entries if isinstance(entry, Mapping) and entry.get("id")}


def no_models(refusal: Refused, is_needed: bool) -> Models:
    """For a server that does not have the list: none, unless it is needed to choose a model; then the refusal is
    raised, as every other refusal."""
    if is_needed or refusal.status != 404:
        raise refusal
    return {}


def only_model(url: str, models: Models) -> str:
    """The one model, or the one Kimi K2 among several."""
    kimis = [name for name in models if "kimi-k2" in name.lower()]
    if len(models) == 1 or len(kimis) == 1:
        return kimis[0] if len(kimis) == 1 else next(iter(models))
    if not models:
        raise KimiLiteError(f"{url} lists no models.", "Name one with -m.")
    names = ", ".join(list(models)[:12]) + (", ..." if len(models) > 12 else "")
    raise KimiLiteError(f"{url} has {len(models)} models: {names}.", "Name one with -m.")


def context_length_of(entry: Mapping[str, Any]) -> int | None:
    """Tokens, as vLLM, OpenRouter or llama-server say it; None where they do not."""
    places = (entry, entry.get("meta") if isinstance(entry.get("meta"), Mapping) else {})
    values = [place.get(key) for place in places for key in CONTEXT_KEYS]
    return next((int(value) for value in values if isinstance(value, int) and value > 0), None)
