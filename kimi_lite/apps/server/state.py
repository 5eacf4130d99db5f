"""What all endpoints share: the engine's service, the settings, and the log."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from starlette.requests import Request as HttpRequest

from kimi_lite.apps.server.chat import Chats
from kimi_lite.apps.server.files import UploadedFiles
from kimi_lite.apps.server.log import AnswerLog
from kimi_lite.apps.server.media import MediaParts
from kimi_lite.apps.server.stored import StoredResponses
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.service import EngineService
from kimi_lite.engine.types import SamplingParams, Stats

_QUESTION = [{"role": "user", "content": "?"}]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server behaves; `command` makes it of the options."""

    model_name: str | None = None  # what /v1/models says; None: the model's own name
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None  # of the Host header; None: any
    origins: tuple[str, ...] = ()  # that pages may ask from
    max_images: int = 64  # and videos, of one request
    has_loop_guard: bool = True
    answers: AnswerSettings = field(default_factory=AnswerSettings)  # of requests that do not say how
    shuts_down_within_s: float = 10.0


@dataclass(slots=True)
class ServerState:
    """What all requests share."""

    service: EngineService
    settings: ServerSettings
    chats: Chats
    log: AnswerLog
    started_s: float = field(default_factory=time.time)
    stored: StoredResponses = field(default_factory=StoredResponses)
    files: UploadedFiles = field(default_factory=UploadedFiles)
    _facts: dict[str, bool] = field(default_factory=dict)  # of the template; looked at once

    @property
    def model_name(self) -> str:
        return self.settings.model_name or self.service.require_ready().info.name

    @property
    def can_call(self) -> bool:
        """Whether the model can be told of tools."""
        if "can_call" not in self._facts:
            template, function = self.service.require_ready().template, {"name": "f", "parameters": {"type": "object"}}
            with_tool = template.encode(_QUESTION, [{"type": "function", "function": function}])
            self._facts["can_call"] = with_tool.ids != template.encode(_QUESTION).ids
        return self._facts["can_call"]

    @property
    def can_think(self) -> bool:
        """Whether the model has a thinking mode."""
        if "can_think" not in self._facts:
            template = self.service.require_ready().template
            self._facts["can_think"] = template.encode(_QUESTION, thinking=True).starts_in_reasoning
        return self._facts["can_think"]

    def media(self) -> MediaParts:
        """What reads the images and videos of one request."""
        return MediaParts(self.service.require_ready().vision is not None, self.files, self.settings.max_images)

    def sampling(self, **asked: object) -> SamplingParams:
        """What a request asks for, by the names of SamplingParams; the server's own where it says nothing (None)."""
        said = {name: value for name, value in asked.items() if value is not None}
        return replace(self.settings.answers.sampling, **said)

    def log_answer(self, num_prompt_tokens: int, stats: Sequence[Stats | None]) -> None:
        """One line for all choices of a request; None: it had no token yet."""
        self.log.answer(num_prompt_tokens, [each for each in stats if each is not None])


def client_of(http: HttpRequest, key: str | None) -> str:
    """Whose turn a request takes: the key it caches under, its API key, or its address."""
    return key or http.headers.get("authorization") or http.headers.get("x-api-key") or (http.client or ("?", 0))[0]
