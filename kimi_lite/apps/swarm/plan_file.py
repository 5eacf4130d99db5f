"""A decomposition that is fixed from outside (`--plan FILE`, TOML or JSON): stages of tasks, one after the other, the
tasks of a stage at the same time. The orchestrator plans nothing and answers at the end.

    task = "Compare the three readers."      # unless the command line has one
    context = "The library is called Foo."   # all agents have it, before their own words
    synthesis = "Write a table."             # what the answer is to be; false: the results are the answer

    [agents.reader]                          # as in --agents
    system_prompt = "You read code."

    [[stages]]
    tasks = [{ agent = "reader", prompt = "Read {{item}}.", items = ["a.py", "b.py"], name = "notes" }]
    [[stages]]
    tasks = [{ agent = "reader", prompt = "Find contradictions in: {{notes}}" }]

`{{name}}` is the whole result of an earlier stage's task of this name.
"""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_lite.apps.swarm.backend import Message
from kimi_lite.apps.swarm.orchestrator import ASSIGN, ITEM, LEAST_ITEMS, MOST_ITEMS, SWARM
from kimi_lite.apps.swarm.permissions import Permissions
from kimi_lite.engine.turns import require_utf8
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import read_text

_KEYS = ("task", "context", "synthesis", "default", "agents", "stages")
_TASK_KEYS = ("agent", "prompt", "items", "name")
_PLACE = re.compile(r"\{\{\s*([\w.-]+)\s*\}\}")
_EXAMPLE = """It looks like:
[agents.reader]
system_prompt = "You read code."
[[stages]]
tasks = [{ agent = "reader", prompt = "Read a.py." }]"""

ResultOf = Callable[[str], str]  # the name of a task -> its whole result


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One call: of `assign_task`, or with items of `agent_swarm`."""

    call_id: str
    agent: str
    prompt: str
    items: tuple[str, ...] = ()
    name: str = ""

    def call(self, result_of: ResultOf) -> dict[str, Any]:
        """As an assistant's message has it, with the results of earlier tasks in their places."""
        prompt = _PLACE.sub(lambda match: match[0] if match[0] == ITEM else result_of(match[1]), self.prompt)
        if self.items:
            tool, arguments = SWARM, {"agent": self.agent, "prompt_template": prompt, "items": list(self.items)}
        else:
            tool, arguments = ASSIGN, {"agent": self.agent, "prompt": prompt}
        function = {"name": tool.name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Plan:
    """A file's decomposition. `document` is the whole file, for a run that is resumed."""

    document: Mapping[str, Any]
    task: str
    context: str
    synthesis: str  # "": as the orchestrator likes
    synthesizes: bool
    permissions: Permissions
    stages: tuple[tuple[PlannedTask, ...], ...]

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """KimiLiteError naming what is wrong in the file."""
        text = read_text(path.expanduser(), "The plan")
        try:
            document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise KimiLiteError(f"The plan {path} cannot be read: {error}.", _EXAMPLE) from error
        return cls.from_document(document, str(path))

    @classmethod
    def from_document(cls, document: Any, where: str) -> "Plan":
        """`where` names the file in the KimiLiteError for what is wrong in it."""
        require_utf8(json.dumps(document, ensure_ascii=False, default=str), f"The plan {where}")
        table = _table(document, f"The plan {where}", _KEYS)
        synthesis = table.get("synthesis", True)
        if not isinstance(synthesis, bool | str):
            raise KimiLiteError(f"The plan {where} sets synthesis to {synthesis!r:.80}; it must be a text or false.")
        permissions = Permissions.from_tables(table, where)
        return cls(
            table,
            _text(table, "task", f"The plan {where}"),
            _text(table, "context", f"The plan {where}"),
            synthesis if isinstance(synthesis, str) else "",
            synthesis is not False,
            permissions,
            _stages(table.get("stages"), where, permissions),
        )

    def message(self, stage: int, result_of: ResultOf) -> Message | None:
        """What the orchestrator says to begin a stage, from 0; None after the last."""
        if stage >= len(self.stages):
            return None
        calls = [task.call(result_of) for task in self.stages[stage]]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def call_id(self, name: str) -> str:
        """The call of the task of this name."""
        return next(task.call_id for stage in self.stages for task in stage if task.name == name)


def _stages(value: Any, where: str, permissions: Permissions) -> tuple[tuple[PlannedTask, ...], ...]:
    if not isinstance(value, list) or not value:
        raise KimiLiteError(f"The plan {where} has no stages.", _EXAMPLE)
    stages: list[tuple[PlannedTask, ...]] = []
    known: set[str] = set()
    number = 0
    for i, entry in enumerate(value, start=1):
        what = f"Stage {i} of the plan {where}"
        tasks = _table(entry, what, ("tasks",)).get("tasks")
        if not isinstance(tasks, list) or not tasks:
            raise KimiLiteError(f"{what} has no tasks.", _EXAMPLE)
        stage = []
        for j, task in enumerate(tasks, start=1):
            stage.append(_task(task, number, f"Task {j} of stage {i} of the plan {where}", permissions, known))
            number += 1
        names = [task.name for task in stage if task.name]
        taken = sorted({name for name in names if name in known or names.count(name) > 1 or name == "item"})
        if taken:
            raise KimiLiteError(f"{what} names a task {taken[0]!r}, which is taken.", "Give each task another name.")
        known.update(names)
        stages.append(tuple(stage))
    return tuple(stages)


def _task(value: Any, number: int, what: str, permissions: Permissions, known: set[str]) -> PlannedTask:
    table = _table(value, what, _TASK_KEYS)
    agent, prompt, items = _text(table, "agent", what), _text(table, "prompt", what), table.get("items", [])
    if agent not in permissions.agents:
        named = ", ".join(permissions.agents) or "none"
        raise KimiLiteError(f"{what} is for the agent {agent!r}, which is not in the plan.", f"There are: {named}.")
    if not prompt.strip():
        raise KimiLiteError(f"{what} has no prompt.", _EXAMPLE)
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise KimiLiteError(f"{what} has items {items!r:.80}; they must be a list of texts.")
    if items and not (LEAST_ITEMS <= len(set(items)) == len(items) <= MOST_ITEMS):
        raise KimiLiteError(f"{what} has {len(items)} items; it must be {LEAST_ITEMS} to {MOST_ITEMS}, all different.")
    if bool(items) != (ITEM in prompt):
        raise KimiLiteError(f"{what} needs both items and {ITEM} in its prompt, or neither.")
    unknown = [name for name in _PLACE.findall(prompt) if name not in known and name != "item"]
    if unknown:
        named = ", ".join(sorted(known)) or "none"
        raise KimiLiteError(f"{what} takes the result {unknown[0]!r}; earlier stages have: {named}.")
    tool = SWARM if items else ASSIGN
    return PlannedTask(f"functions.{tool.name}:{number}", agent, prompt, tuple(items), _text(table, "name", what))


def _table(value: Any, what: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise KimiLiteError(f"{what} is {value!r:.80}; it must be a table.", _EXAMPLE)
    unknown = [key for key in value if key not in known]
    if unknown:
        raise KimiLiteError(f"{what} sets {', '.join(unknown)}, which is not known.", f"Known are: {', '.join(known)}.")
    return value


def _text(table: Mapping[str, Any], key: str, what: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise KimiLiteError(f"{what} sets {key} to {value!r:.80}; it must be a text.")
    return value
