"""The calls of one agent: in a box of its own, in threads, told to those who watch, and taken from the journal where a
resumed run made them already."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor, Future

from kimi_lite.apps.swarm.agent import Results, Work
from kimi_lite.apps.swarm.backend import Message
from kimi_lite.apps.swarm.events import ToolEnded, ToolOutcome, ToolStarted, Warned
from kimi_lite.apps.tools.box import ToolBox
from kimi_lite.apps.tools.confirm import Permission, Question
from kimi_lite.apps.tools.tool import shortened
from kimi_lite.text.tool_calls import ToolCall

LONGEST_ARGUMENTS = 400  # characters, of those that are told
_STOP_POLL_S = 0.02


class AgentTools:
    """One call after the other, as the agent made them: a later one may read what an earlier one wrote."""

    def __init__(self, work: Work, agent_id: str, box: ToolBox, threads: Executor) -> None:
        self._work, self._agent_id, self._box, self._threads = work, agent_id, box, threads

    @property
    def declarations(self) -> Sequence[Message]:
        return self._box.declarations

    def starts_agents(self, calls: Sequence[ToolCall]) -> bool:
        return False

    async def run(self, calls: Sequence[ToolCall]) -> Results:
        ended = [await self.call(call) for call in calls]
        return Results([each.result for each in ended], sum(each.seconds for each in ended))

    async def call(self, call: ToolCall) -> ToolEnded:
        """The call's end, as it is told. Cancelled, it stops the tool and waits until it has stopped."""
        if known := self._work.replay.call(self._agent_id, call.id):
            return known
        emitter = self._work.emitter
        if self._work.replay.is_cut_off(self._agent_id, call.id):
            text = f"{self._agent_id} calls {call.name} again: the run ended before, and what came of it is not known"
            emitter.emit(lambda t_s: Warned(t_s, text))
        arguments = shortened(call.arguments, LONGEST_ARGUMENTS)
        emitter.emit(lambda t_s: ToolStarted(t_s, self._agent_id, call.id, call.name, arguments))
        started_s = emitter.now_s

        def end(outcome: ToolOutcome, text: str) -> ToolEnded:
            seconds = round(emitter.now_s - started_s, 4)
            return emitter.emit(lambda t_s: ToolEnded(t_s, self._agent_id, call.id, call.name, outcome, text, seconds))

        running = self._threads.submit(self._box.call, call, _refuse)
        try:
            text = await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            await self._stop(running)
            end("cancelled", "")
            raise
        return end("failed" if text.startswith("Error: ") else "completed", text)

    async def _stop(self, running: Future[str]) -> None:
        """Until the tool has really ended: it may write no file once its agent is gone."""
        running.cancel()
        while not running.done():
            self._box.cancel()
            await asyncio.sleep(_STOP_POLL_S)


def _refuse(question: Question) -> Permission:
    """Agents run unattended: what they may not use they do not have."""
    return "no"
