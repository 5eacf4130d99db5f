"""From the command line's flags to a session: find the model or build the demo, load it with progress. Used by `cli`."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from kimi_lite.apps.render import WorkProgress, show_plain
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.options import LoadOptions
from kimi_lite.engine.session import Session
from kimi_lite.engine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags of `chat` and `run` say. None: not said."""

    model: Path | None = None
    load: LoadOptions = field(default_factory=LoadOptions)
    system: str = ""
    is_thinking: bool | None = None
    temperature: float | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)  # but for the temperature
    is_quiet: bool = False


def open_session(settings: Settings, aside: Console) -> Session:
    """Load the model and begin a conversation. Progress and remarks go to `aside`."""
    path = settings.model or _demo_path(aside, settings.is_quiet)
    with WorkProgress(aside) as progress:
        engine = Engine.open(path, settings.load, None if settings.is_quiet else progress)
    session = Session(engine, settings.system, AnswerSettings(temperature=settings.temperature, sampling=settings.sampling))
    session.set_thinking(session.can_think if settings.is_thinking is None else settings.is_thinking)
    return session


def _demo_path(aside: Console, is_quiet: bool) -> Path:
    """No model was named: the small demo model, and a word on how to get the real one."""
    from kimi_lite.demo.build import ensure_demo_model

    if not is_quiet:
        show_plain(aside, "no -m given: this is the demo, a 135 M chat model in Kimi K2.5's architecture.", style="dim")
        show_plain(aside, "for the real one say -m FOLDER: a GGUF from elsewhere, or made by kimi-lite quantize.", style="dim")
    with WorkProgress(aside, decimal) as progress:
        return ensure_demo_model(None if is_quiet else progress)
