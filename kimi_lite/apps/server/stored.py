"""Responses that a client may go on from by their ids: kept in memory, the oldest are forgotten first."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kimi_lite.apps.server.errors import ApiError

MAX_RESPONSES, MAX_CHARACTERS = 1000, 64 << 20
Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`items`: the whole conversation up to and with this response's output."""

    document: Mapping[str, Any]
    items: tuple[Item, ...]
    num_characters: int  # of the JSON that it added


class StoredResponses:
    """By id. What is asked for again is kept longer."""

    def __init__(self) -> None:
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_characters = 0

    def add(self, response: StoredResponse) -> None:
        """Under its document's id."""
        self._responses[response.document["id"]] = response
        self._num_characters += response.num_characters
        while len(self._responses) > MAX_RESPONSES or self._num_characters > MAX_CHARACTERS:
            self._num_characters -= self._responses.popitem(last=False)[1].num_characters

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """ApiError 404 where it is not kept, or no longer."""
        if response_id not in self._responses:
            raise missing("response", response_id, param)
        self._responses.move_to_end(response_id)
        return self._responses[response_id]

    def remove(self, response_id: str) -> None:
        """ApiError 404 where it is not kept."""
        if response_id not in self._responses:
            raise missing("response", response_id, None)
        self._num_characters -= self._responses.pop(response_id).num_characters

    def items(self) -> Iterator[Item]:
        """All that are kept, the oldest responses' first."""
        return chain.from_iterable(response.items for response in self._responses.values())


def missing(noun: str, name: object, param: str | None) -> ApiError:
    """Of a response or an item that is not kept."""
    problem = f"There is no {noun} {str(name)[:80]!r}: it was never stored, or is forgotten. Send its text instead."
    return ApiError(404, problem, f"{noun}_not_found", param)
