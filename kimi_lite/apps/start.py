"""From the command line's flags to a conversation: find the model or build the demo, load it with progress, say what it
is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kimi_lite import __version__
from kimi_lite.apps.chat.interrupt import on_interrupt, silent_keys
from kimi_lite.apps.chat.render import describe_model
from kimi_lite.apps.progress import LoadProgress
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.session import Session
from kimi_lite.engine.types import SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import LoadOptions
from kimi_lite.terminal import Console, show_plain
from kimi_lite.units import parse_size

DEMO_REMARKS = (
    "no -m given: this is the demo, a 135 M model in Kimi K2.5's architecture",
    "the real one: -m FOLDER, a GGUF from elsewhere or by kimi-lite quantize",
)
_RAM_SHARE = 0.9  # of the free memory that a model's files may fill


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags of `chat` and `run` say. None: not said."""

    model: Path | None = None
    endpoint: str | None = None
    api_key: str | None = field(default=None, repr=False)
    load: LoadOptions = field(default_factory=LoadOptions)
    system: str = ""
    is_thinking: bool | None = None
    answer: AnswerSettings = field(default_factory=AnswerSettings)  # but for the mode
    is_warm: bool = False  # the model's files are read into memory before the first prompt
    is_quiet: bool = False

    @property
    def is_demo(self) -> bool:
        return self.model is None and self.endpoint is None

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "Settings":
        """From the parameters of a command, by name; KimiLiteError for values that make no sense."""
        folder, size_bytes = _prefix_cache(flags)
        load = LoadOptions(
            context_length=flags["context"],
            num_threads=flags["threads"],
            kv_dtype=flags["kv_dtype"],
            device=flags["device"],
            vram_bytes=parse_size(flags["vram"], "--vram") if flags["vram"] else None,
            num_gpu_experts=flags["gpu_experts"],
            dense_type=flags["dense"],
            ram_bytes=parse_size(flags["ram"], "--ram") if flags["ram"] else None,
            loading=flags["load"],
            routing_trace=flags["record_routing"],
            cache_bias=flags["cache_bias"],
            prefix_folder=folder,
            prefix_bytes=size_bytes,
        )
        max_tokens, temperature, budget = flags["max_tokens"], flags["temperature"], flags["think_budget"]
        sampling = SamplingParams(
            temperature=1.0 if temperature is None else temperature,
            top_k=flags["top_k"],
            top_p=flags["top_p"],
            min_p=flags["min_p"],
            repetition_penalty=flags["repeat_penalty"],
            seed=flags["seed"],
            max_tokens=None if max_tokens == -1 else max_tokens,
        )
        answer = AnswerSettings(
            temperature=temperature,
            sampling=sampling,
            thinking_budget=None if budget is None or budget < 0 else budget,
            preserve_thinking=flags["preserve_thinking"],
        )
        model = None if flags["model"] is None else Path(flags["model"])
        sources = {name: flags[name] for name in ("endpoint", "api_key", "system")}
        return cls(model, **sources, load=load, is_thinking=flags["think"], answer=answer, is_quiet=flags["quiet"])


def open_session(settings: Settings, aside: Console) -> Conversation:
    """Load the model, or reach the endpoint, and begin a conversation. Progress goes to `aside`."""
    session = _open_remote(settings) if settings.endpoint else _open_local(settings, aside)
    session.set_thinking(session.can_think if settings.is_thinking is None else settings.is_thinking)
    if settings.answer.thinking_budget is not None:
        session.require_budget()
    if settings.answer.preserve_thinking and not session.can_preserve:
        raise KimiLiteError(
            f"The chat template of {session.info.name} always drops past reasoning.", "Leave --preserve-thinking out."
        )
    return session


def greeting(session: Conversation, settings: Settings) -> list[str]:
    """The lines before the first prompt: model, recipe, where things lie, context, mode, ceiling."""
    plan = getattr(getattr(session, "engine", None), "plan", None)
    mode = session.mode if session.can_think else f"no thinking mode ({session.settings.describe_sampling()})"
    if plan is None:
        context = "" if session.context_length is None else f" · context {session.context_length:,}"
        place = f"  {settings.endpoint}" if settings.endpoint else f"  {describe_model(session.info)}"
        lines = [f"kimi-lite {__version__} · {session.info.name}", f"{place}{context}", f"  {mode} · /help for help"]
    else:
        from kimi_lite.plan.view import start_panel

        lines = start_panel(plan, mode, "/help for help")
    return [*lines, *(f"  {line}" for line in DEMO_REMARKS if settings.is_demo)]


def _open_remote(settings: Settings) -> Conversation:
    from kimi_lite.apps.remote.session import RemoteSession

    model = None if settings.model is None else str(settings.model)  # the endpoint's name for it
    return RemoteSession.open(settings.endpoint, settings.api_key, model, settings.system, settings.answer)


def _open_local(settings: Settings, aside: Console) -> Session:
    with silent_keys(), LoadProgress(aside if not settings.is_quiet else Console(quiet=True)) as progress:
        path = settings.model or _demo_path(progress)
        engine = Engine.open(path, settings.load, None if settings.is_quiet else progress)
        try:
            if settings.is_warm:
                _warm(engine, settings.load, progress)
            return Session(engine, settings.system, settings.answer)
        except BaseException:
            engine.close()
            raise


def _warm(engine: Engine, load: LoadOptions, progress: LoadProgress) -> None:
    """Read the model into memory where it fits; Ctrl-C leaves the rest for later."""
    from kimi_lite.experts.warm import warm
    from kimi_lite.gguf.shards import find_shards

    path = engine.info.path
    if load.ram_bytes is not None or not path.is_file():
        return
    if engine.info.total_bytes > _RAM_SHARE * psutil.virtual_memory().available:
        return
    with on_interrupt(lambda: None) as interrupt:
        warm(
            find_shards(path), lambda done, total: progress("reading weights", done, total), lambda: interrupt.has_come
        )


def _demo_path(progress: LoadProgress) -> Path:
    """No model was named: the small demo model."""
    from kimi_lite.demo.build import ensure_demo_model

    return ensure_demo_model(progress)


def say_demo(aside: Console) -> None:
    """For `run`, which has no panel."""
    for line in DEMO_REMARKS:
        show_plain(aside, line, style="dim")


def _prefix_cache(flags: Mapping[str, Any]) -> tuple[Path | None, int | None]:
    """Where cached prompts outlive the process, and how large that place may become."""
    if not flags["prefix_cache"]:
        return None, None
    from kimi_lite.demo.build import cache_folder

    return cache_folder() / "prefixes", parse_size(flags["prefix_cache_size"], "--prefix-cache-size")
