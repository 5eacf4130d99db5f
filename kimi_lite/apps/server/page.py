"""`/`: the page to talk with the model in a browser, and `/status`, which its live panel asks.

The page is one file without anything from elsewhere. Its policy lets it run its own script and style, named by their
hashes, and talk to this server; text of a model that found a way into it as HTML could do nothing.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from kimi_lite import __version__
from kimi_lite.apps.server.state import ServerState

_OWN_PARTS = {
    "script-src": re.compile(r"<script>(.*?)</script>", re.S),
    "style-src": re.compile(r"<style>(.*?)</style>", re.S),
}
# Where experts are looked for: the place, and the engine's counters of what was found there and what was not.
_TIERS = (("VRAM", "gpu_expert_hits", "gpu_expert_misses"), ("RAM", "expert_hits", "expert_misses"))


async def page(http: HttpRequest) -> Response:
    """GET /: the page."""
    text, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


async def status(http: HttpRequest) -> Response:
    """GET /status: what the server is doing; with `?heat=1` the experts' heat, too."""
    state: ServerState = http.app.state.server
    service = state.service
    body: dict[str, Any] = {
        "state": service.state,
        "version": __version__,
        "needs_key": bool(state.settings.api_keys),
        "loading": None if service.loading is None else asdict(service.loading),
    }
    if service.state == "ready":
        body |= _figures(state, wants_heat=http.query_params.get("heat") == "1")
    return JSONResponse(body, headers={"Cache-Control": "no-store"})


def _figures(state: ServerState, wants_heat: bool) -> dict[str, Any]:
    engine, load, seen = state.service.require_ready(), state.service.load(), state.service.snapshot
    return {
        "model": state.model_name,
        "context_length": engine.context_length,
        "parallel": engine.scheduler.max_running,
        "can_think": state.can_think,
        "running": load.num_running,
        "waiting": load.num_waiting,
        "prompt_tok_s": round(load.prompt_tok_s, 2),
        "generation_tok_s": round(load.generation_tok_s, 2),
        "totals": dict(state.service.totals()),
        "counters": dict(seen.counters),
        "tiers": tiers(seen.counters),
        "heat": heat_picture(seen.heat) if wants_heat and seen.heat is not None else None,
    }


def tiers(counters: Mapping[str, float]) -> list[dict[str, Any]]:
    """For each place where experts are kept: how many of those that were wanted were there."""
    return [
        {"name": name, "hits": counters[hits], "misses": counters[misses]}
        for name, hits, misses in _TIERS
        if hits in counters
    ]


def heat_picture(heat: np.ndarray) -> dict[str, Any]:
    """float32 (layers, experts) as bytes of 0 to 255, row by row in base64. By square roots: what is lukewarm shows."""
    most = float(heat.max(initial=0.0))
    shares = np.sqrt(heat / most) if most > 0 else np.zeros_like(heat)
    values = np.round(255 * shares).astype(np.uint8)  # (L, E)
    return {
        "layers": heat.shape[0],
        "experts": heat.shape[1],
        "values": base64.b64encode(values.tobytes()).decode(),
    }


@functools.cache
def _page() -> tuple[str, str]:
    """The page, and the policy that lets it be what it is and nothing more."""
    text = files("kimi_lite.apps.server").joinpath("page.html").read_text("utf-8")
    allowed = {"default-src": "'none'", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'"}
    allowed["frame-ancestors"] = "'none'"
    for directive, pattern in _OWN_PARTS.items():
        (part,) = pattern.findall(text)
        allowed[directive] = f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
    return text, "; ".join(f"{directive} {source}" for directive, source in allowed.items())
