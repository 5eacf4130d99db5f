"""From the command line, the environment and the configuration file to `Options`.

A command is a function whose first parameter takes the `Options`; `@with_options("chat")` gives it the flags of every
option that `kimi_lite.options` declares for it. What is typed goes before the environment, that before the file. Read
by `cli`, so nothing heavy is imported here.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from kimi_lite.commandline.config_file import Setting, config_path, read_settings
from kimi_lite.options import Option, Options, options_of


def with_options(command: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates `function(options, ...)`; the parameters after the first stay the command's own flags."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        shared = options_of(command)

        @functools.wraps(function)
        def parsed(**values: Any) -> Any:
            typed = {option.name: values.pop(option.name) for option in shared}
            return function(resolve(command, typed), **values)

        parameters = [*own, *map(functools.partial(_parameter, command), shared)]
        parsed.__signature__ = inspect.Signature(
            [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        )
        parsed.__annotations__ = {each.name: each.annotation for each in parameters}
        return parsed

    return decorate


def resolve(command: str, typed: Mapping[str, object]) -> Options:
    """`typed`: by the names of fields, None where nothing was typed. Raises KimiLiteError, naming where a bad value
    came from."""
    settings = read_settings(config_path())
    values, given = {}, {}
    for option in options_of(command):
        value, source = _find(option, typed.get(option.name), settings)
        if source:
            values[option.name], given[option.name] = option.parse(value, source), source
        elif option.command_default is not None:
            values[option.name] = option.parse(option.command_default, option.long_flag)
    return Options(**values, given=given)


def _find(option: Option, typed: object, settings: Mapping[str, Setting]) -> tuple[object, str]:
    """The value and what it came from: a flag, a variable, a line of the file; ("", "") where nothing is said."""
    if typed is not None and typed != []:
        sides = option.flags[-1].split("/")
        return typed, sides[1] if typed is False and len(sides) > 1 else option.long_flag
    if option.is_setting and (text := os.environ.get(option.variable)):
        return text.split() if option.kind == "texts" else text, option.variable
    if option.is_setting and (setting := settings.get(option.name)):
        return setting.value, setting.source
    return "", ""


def _parameter(command: str, option: Option) -> inspect.Parameter:
    """What typer makes a flag of: a text that `Option.parse` will read, a switch, or a list of texts."""
    type_ = {"switch": bool | None, "texts": list[str] | None}.get(option.kind, str | None)
    names = {"integer": "INTEGER", "number": "NUMBER", "size": "SIZE", "sizes": "SIZE", "path": "PATH", "text": "TEXT"}
    metavar = f"[{'|'.join(option.choices)}]" if option.choices else option.metavar or names.get(option.kind)
    default = f" Default: {option.shown_default}." if option.shown_default else ""
    info = typer.Option(
        *option.flags,
        help=option.help_in.get(command, option.help) + default,
        rich_help_panel=option.panel_in.get(command, option.panel),
        metavar=None if option.kind == "switch" else metavar,
        show_default=False,
    )
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[type_, info]
    )
