"""What the agents of a swarm may do: which tools, how many steps and tokens. A TOML file (`--agents FILE`):

    [default]                  # for agents that are not named below
    tools = ["read_file", "search_files", "board_*"]
    max_steps = 50             # answers, calls of tools included
    max_tokens = 40_000        # generated in all

    [agents.coder]             # there from the beginning; the orchestrator may create more
    system_prompt = "You write Python."
    tools = ["*"]

Without a file, agents have the tools that change nothing outside the run: those that read, and the board's. `--allow`
adds others. `*` stands for every tool but those that this system does not confine, which must be named.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kimi_lite.apps.tools.tool import Tool
from kimi_lite.engine.turns import require_utf8
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import read_text

DEFAULT_TOOLS = ("list_files", "read_file", "search_files", "board_*")
_KEYS = ("system_prompt", "tools", "max_steps", "max_tokens")
_EXAMPLE = 'It looks like:\n[agents.coder]\nsystem_prompt = "You write Python."\ntools = ["read_file", "board_*"]'


@dataclass(frozen=True, slots=True)
class Rules:
    """Of one agent, or of all that have none of their own; None is what nothing is said about."""

    system_prompt: str | None = None
    tools: tuple[str, ...] | None = None  # names, or patterns with * and ?
    max_steps: int | None = None
    max_tokens: int | None = None

    def over(self, default: "Rules") -> "Rules":
        """With what is not said here from `default`."""
        return Rules(
            system_prompt=default.system_prompt if self.system_prompt is None else self.system_prompt,
            tools=default.tools if self.tools is None else self.tools,
            max_steps=default.max_steps if self.max_steps is None else self.max_steps,
            max_tokens=default.max_tokens if self.max_tokens is None else self.max_tokens,
        )


@dataclass(frozen=True, slots=True)
class Permissions:
    """The rules of a run."""

    default: Rules = Rules(tools=DEFAULT_TOOLS)
    agents: Mapping[str, Rules] = field(default_factory=dict)  # by the names of their configurations

    @classmethod
    def read(cls, path: Path) -> "Permissions":
        """From a file; KimiLiteError naming what is wrong in it."""
        what = f"The agents' file {path}"
        try:
            document = tomllib.loads(read_text(path.expanduser(), "The agents' file"))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise KimiLiteError(f"{what} cannot be read: {error}.", _EXAMPLE) from error
        _require_keys(document, ("default", "agents"), what)
        return cls.from_tables(document, str(path))

    @classmethod
    def from_tables(cls, document: Mapping[str, Any], where: str) -> "Permissions":
        """From the tables `default` and `agents` of a file, which `where` names."""
        default = _rules(document.get("default", {}), f"[default] in {where}")
        agents = document.get("agents", {})
        if not isinstance(agents, dict):
            raise KimiLiteError(f"{where} sets agents to {agents!r:.80}.", _EXAMPLE)
        return cls(
            default.over(cls().default),
            {name: _rules(table, f"[agents.{name}] in {where}") for name, table in agents.items()},
        )

    def to_tables(self) -> dict[str, Any]:
        """What `from_tables` reads, for a run that may be resumed when the file is another."""
        agents = {name: _table(rules) for name, rules in self.agents.items()}
        return {"default": _table(self.default), "agents": agents}

    def with_allowed(self, names: Sequence[str]) -> "Permissions":
        """With more tools for the agents that have no list of their own: `--allow`."""
        return replace(self, default=replace(self.default, tools=(*(self.default.tools or ()), *names)))

    def of(self, name: str) -> Rules:
        """The rules for an agent of this name, complete."""
        return self.agents.get(name, Rules()).over(self.default)

    def tools_of(self, name: str, tools: Iterable[Tool]) -> list[Tool]:
        """Those of `tools` that an agent of this name may use, in their order."""
        patterns = self.of(name).tools or ()
        return [tool for tool in tools if any(_allows(pattern, tool) for pattern in patterns)]

    def require_known(self, tools: Iterable[Tool]) -> None:
        """KimiLiteError for a name or a pattern that means none of `tools`; the defaults may."""
        names = [tool.name for tool in tools]
        for where, rules in (("[default] or --allow", self.default), *self.agents.items()):
            unknown = [
                pattern
                for pattern in rules.tools or ()
                if pattern not in DEFAULT_TOOLS and not any(fnmatchcase(name, pattern) for name in names)
            ]
            if unknown:
                who = where if rules is self.default else f"The agent {where}"
                raise KimiLiteError(
                    f"{who} is to have {', '.join(unknown)}, and there is no such tool.",
                    f"There are: {', '.join(names) or 'none'}; --dir FOLDER and --mcp-config FILE bring more.",
                )


def _table(rules: Rules) -> dict[str, Any]:
    values = {name: getattr(rules, name) for name in _KEYS if getattr(rules, name) is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _allows(pattern: str, tool: Tool) -> bool:
    """A tool that is not confined is allowed by its name only."""
    return pattern == tool.name if tool.risks else fnmatchcase(tool.name, pattern)


def _rules(table: Any, what: str) -> Rules:
    if not isinstance(table, dict):
        raise KimiLiteError(f"{what} is {table!r:.80}; it must be a table.", _EXAMPLE)
    _require_keys(table, _KEYS, what)
    prompt, tools = table.get("system_prompt"), table.get("tools")
    if prompt is not None:
        if not isinstance(prompt, str):
            raise KimiLiteError(f"{what} sets system_prompt to {prompt!r:.80}; it must be a text.")
        require_utf8(prompt, f"The system prompt of {what}")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(name, str) for name in tools)):
        raise KimiLiteError(f"{what} sets tools to {tools!r:.80}; it must be a list of names.", _EXAMPLE)
    return Rules(
        system_prompt=prompt,
        tools=None if tools is None else tuple(tools),
        max_steps=_count(table, "max_steps", what),
        max_tokens=_count(table, "max_tokens", what),
    )


def _count(table: Mapping[str, Any], key: str, what: str) -> int | None:
    value = table.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise KimiLiteError(f"{what} sets {key} to {value!r:.80}; it must be a whole number, 1 or more.")
    return value


def _require_keys(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise KimiLiteError(f"{what} sets {', '.join(unknown)}, which is not known.", f"Known are: {', '.join(known)}.")
