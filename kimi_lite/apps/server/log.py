"""The server's log: one line a request on stderr, plain or as JSON. What was said is not in it."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Sequence

from kimi_lite.engine.types import Stats
from kimi_lite.errors import KimiLiteError
from kimi_lite.terminal import harmless

LEVELS = ("error", "warning", "info", "debug")
logger = logging.getLogger("kimi_lite.server")


class AnswerLog:
    """Writes what was answered, how fast, and what went wrong."""

    def __init__(self, is_json: bool = False) -> None:
        self._is_json = is_json

    def answer(self, num_prompt_tokens: int, stats: Sequence[Stats]) -> None:
        """One line for a request that has ended."""
        if not stats:
            self._write(logging.INFO, "ended before its first token", prompt_tokens=num_prompt_tokens)
            return
        first = stats[0]
        num_generated = sum(each.generated_tokens for each in stats)
        facts = {
            "prompt_tokens": num_prompt_tokens,
            "cached_tokens": first.cached_tokens,
            "prompt_tok_s": _rounded(first.prompt_tok_s),
            "generated_tokens": num_generated,
            "generation_tok_s": _rounded(first.generation_tok_s),
            "time_to_first_token_s": _rounded(first.time_to_first_token_s),
        }
        self._write(logging.INFO, "answered", **facts)

    def failure(self, error: BaseException) -> None:
        """What the client is only told in general."""
        if isinstance(error, KimiLiteError):
            self._write(logging.WARNING, " ".join(str(error).splitlines()))
        elif self._is_json:
            self._write(logging.ERROR, "a request failed", error="".join(traceback.format_exception(error)))
        else:
            logger.error("a request failed", exc_info=error)

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request was taken or refused; a stream only begins then."""
        self._write(logging.DEBUG, f"{method} {path[:100]}", status=status, seconds=round(seconds, 3))

    def refusal(self, path: str, status: int, code: str | None, param: str | None) -> None:
        """Why a client was refused, as far as no text of a prompt is in it."""
        self._write(logging.INFO, f"refused {path[:100]}", status=status, code=code, param=param)

    def left_out(self, kinds: Sequence[str]) -> None:
        """Tools that were not declared to the model, since their client cannot run them."""
        self._write(logging.INFO, f"tools left out: {', '.join(kinds)}")

    def _write(self, level: int, message: str, **facts: object) -> None:
        if self._is_json:
            text = json.dumps({"time": round(time.time(), 3), "message": message, **facts}, ensure_ascii=False)
        else:
            text = " · ".join([message, *(f"{name} {value}" for name, value in facts.items() if value is not None)])
        logger.log(level, harmless(text))


class _Lines(logging.Formatter):
    """The server's own messages are as they should be; those of other parts become harmless, and JSON."""

    def __init__(self, is_json: bool) -> None:
        super().__init__("%(message)s" if is_json else "%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.name == logger.name:
            return message
        if not self._is_json:
            return harmless(message)
        return json.dumps({"time": round(record.created, 3), "message": harmless(message)}, ensure_ascii=False)


def set_up(level: str, is_json: bool) -> AnswerLog:
    """Log to stderr from `level` on: requests, and what model, cache and images say of themselves."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(is_json))
    for each in (logger, logging.getLogger("kimi_lite")):
        each.handlers[:] = [handler]
        each.propagate = False
        each.setLevel(level.upper())
    return AnswerLog(is_json)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
