"""What `--endpoint` says of a server: `URL[=WEIGHT][,model=NAME][,role=ROLE][,parallel=N][,key=VARIABLE]`.

    --endpoint http://a:8000=2 --endpoint http://b:8000
    --endpoint https://api.moonshot.ai/v1,role=orchestrator,key=MOONSHOT_API_KEY --endpoint http://a:8000,role=agents

A server of weight 2 gets twice as many agents as one of weight 1. `key` names the environment variable that holds the
API key, so that no key stands in a command line, and none goes to another server.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kimi_lite.apps.remote.endpoint import address_of, key_of
from kimi_lite.errors import KimiLiteError

Role = Literal["any", "orchestrator", "agents"]
FORM = "URL[=WEIGHT][,model=NAME][,role=orchestrator|agents][,parallel=N][,key=VARIABLE]"
_NAMES = ("model", "role", "parallel", "key")


@dataclass(frozen=True, slots=True)
class EndpointChoice:
    """One server of a swarm."""

    url: str  # as it was typed: it may hold a user and a password
    weight: float = 1.0
    model: str | None = None  # None: the only one it has
    role: Role = "any"
    most_at_once: int | None = None  # requests; None: as many as there are
    key_variable: str | None = None  # None: as every endpoint finds its key

    def serves(self, is_orchestrator: bool) -> bool:
        """Whether questions of the orchestrator, or else of its agents, go to it."""
        return self.role in ("any", "orchestrator" if is_orchestrator else "agents")

    def key(self, api_key: str | None = None) -> str | None:
        """The API key; `api_key`: for servers that name no variable. KimiLiteError where the variable is not set."""
        if self.key_variable is None:
            return key_of(self.url, api_key)
        key = os.environ.get(self.key_variable)
        if not key:
            raise KimiLiteError(
                f"The key for {address_of(self.url).url} is to come from {self.key_variable}, which is not set.",
                f"export {self.key_variable}=..., or leave key= out.",
            )
        return key


def parse_endpoints(texts: Sequence[str], model: str | None = None) -> list[EndpointChoice]:
    """All `--endpoint`s; `model` for those that name none. KimiLiteError where one says nothing sensible, or where
    none is left to answer the orchestrator, or the agents."""
    choices = [parse_endpoint(text, model) for text in texts]
    for is_orchestrator, role in ((True, "orchestrator"), (False, "agents")):
        if not any(choice.serves(is_orchestrator) for choice in choices):
            raise KimiLiteError(
                f"Of {len(choices)} endpoints none serves the {role}.", f"Leave role= out, or add one for the {role}."
            )
    return choices


def parse_endpoint(text: str, model: str | None = None) -> EndpointChoice:
    """One `--endpoint`. Raises KimiLiteError."""
    place, *parts = text.strip().split(",")
    url, weight = _weighted(place)
    address_of(url)
    said: dict[str, str] = {}
    for part in parts:
        name, is_assigned, value = part.strip().partition("=")
        if name not in _NAMES or not is_assigned or not value or name in said:
            raise _wrong(text, f"{part!r} says nothing")
        said[name] = value
    return EndpointChoice(
        url, weight, said.get("model", model), _role(text, said), _parallel(text, said), said.get("key")
    )


def without_password(text: str) -> str:
    """An `--endpoint` as a run keeps it: who resumes the run says again who asks."""
    return re.sub(r"(?<=//)[^/,]*@|^[^/,]*@", "", text)


def _weighted(place: str) -> tuple[str, float]:
    """An address may itself have a = in it: a weight is a number behind the last one."""
    url, is_assigned, weight = place.rpartition("=")
    if not is_assigned:
        return place, 1.0
    try:
        number = float(weight)
    except ValueError:
        return place, 1.0
    if not (math.isfinite(number) and number > 0):
        raise _wrong(place, f"the weight is {weight}; it must be above 0")
    return url, number


def _role(text: str, said: Mapping[str, str]) -> Role:
    role = said.get("role", "any")
    if role not in get_args(Role):
        raise _wrong(text, f"the role is {role!r}; it is orchestrator or agents")
    return role


def _parallel(text: str, said: Mapping[str, str]) -> int | None:
    parallel = said.get("parallel")
    if parallel is None:
        return None
    if not (parallel.isascii() and parallel.isdecimal() and int(parallel[:9]) > 0 and len(parallel) < 9):
        raise _wrong(text, f"parallel is {parallel!r}; it is a whole number above 0")
    return int(parallel)


def _wrong(text: str, problem: str) -> KimiLiteError:
    return KimiLiteError(f"--endpoint {without_password(text)!r}: {problem}.", f"Write {FORM}.")
