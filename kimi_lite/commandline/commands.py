"""How typer's commands behave here: they understand llama.cpp's flags, a bare `kimi-lite` is help, and a command that
people know from elsewhere is answered with ours."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from kimi_lite.commandline.llama_flags import Accepted, translate
from kimi_lite.errors import KimiLiteError

Client = Literal["opencode", "codex", "claude", "aider", "kimi", "qwen"]  # that `launch` knows

_ELSEWHERE = {
    **dict.fromkeys(("list", "ls"), "kimi-lite models lists what is on this machine, kimi-lite pull REPO what is not."),
    "ps": "A model is loaded by the command that uses it and leaves memory with it.",
    "show": "kimi-lite doctor -m FILE checks and describes a file, kimi-lite plan -m FILE says how it would run.",
    **dict.fromkeys(("rm", "delete", "remove"), "kimi-lite models --rm NAME deletes a model that was pulled."),
    **dict.fromkeys(("download", "get"), "kimi-lite pull OWNER/REPO:QUANT downloads a model."),
    **dict.fromkeys(("server", "start"), "kimi-lite serve answers requests over HTTP."),
    **dict.fromkeys(("cli", "generate", "completion"), "kimi-lite run answers one prompt, kimi-lite chat talks."),
    **dict.fromkeys(("perplexity", "ppl"), "python -m tools.quality measures perplexity."),
    **dict.fromkeys(("convert", "create", "import"), "kimi-lite quantize makes a GGUF of a checkpoint."),
}


@contextmanager
def _harmless_errors() -> Iterator[None]:
    """Usage errors quote the command line, names of files among it; typer escapes controls alone."""
    try:
        yield
    except typer.BadParameter.__mro__[2] as error:  # ClickException, which typer does not export
        from kimi_lite.terminal import harmless

        message = harmless(error.format_message())
        error.format_message = lambda: message
        raise


class Command(TyperCommand):
    """With llama.cpp's flags. Arguments that have no place are answered with the option they belong to."""

    allow_extra_args = True  # here they are refused with more words than typer has

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        extra = super().parse_args(ctx, self._translated(ctx, args))
        if extra and not ctx.resilient_parsing:
            self._refuse(ctx, extra)
        return extra

    def _refuse(self, ctx: typer.Context, extra: list[str]) -> None:
        name, first = _name_of(ctx), extra[0]
        taken = [value for value in ctx.params.values() if isinstance(value, str)]
        model = next((word for word in (*taken, *extra) if _is_model(word)), None)
        takes_model = any("--model" in param.opts for param in self.params)
        if takes_model and model is not None:
            hint = f"A model is named with -m: kimi-lite {name} -m {shlex.quote(model)}."
        elif name in ("run", "swarm"):
            hint = f"Put the whole {'prompt' if name == 'run' else 'task'} into quotes."
        elif name == "chat":
            hint = f"A model is named with -m; kimi-lite run {shlex.quote(' '.join(extra))} answers one prompt."
        elif name == "quantize":
            hint = "Types of the experts are named with --recipe, as --recipe q4_k."
        else:
            hint = f"{ctx.command_path} --help lists the options."
        raise KimiLiteError(f"{name} has no place for {first!r}.", hint)

    def _translated(self, ctx: typer.Context, args: list[str]) -> list[str]:
        options = [each for each in self.params if isinstance(each, TyperOption)]
        help_names = frozenset(self.get_help_option_names(ctx))
        switches = frozenset(n for o in options if o.is_flag for n in (*o.opts, *o.secondary_opts)) | help_names
        with_value = frozenset(n for o in options if not o.is_flag for n in o.opts)
        is_quiet = not {"-q", "--quiet"}.isdisjoint(args)
        say = (lambda line: None) if is_quiet else _say
        return translate(_name_of(ctx), Accepted(with_value, switches), args, say)


class Launch(Command):
    """Ours up to the name of a client, then all of it the client's."""

    allow_extra_args = False
    OURS = "kimi_lite.ours"  # the key of what was typed for us, in the context's `meta`
    allow_interspersed_args = False

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        with_value = {n for o in self.params if isinstance(o, TyperOption) and not o.is_flag for n in o.opts}
        after = ["", *args]
        named = (i for i, arg in enumerate(args) if arg in get_args(Client) and after[i] not in with_value)
        place = next(named, len(args))
        ours = [arg for arg in args[:place] if arg != "--"]
        ctx.meta[self.OURS] = [arg for arg in ours if arg != "--print"]
        return TyperCommand.parse_args(self, ctx, [*self._translated(ctx, ours), *args[place:]])


class DefaultGroup(TyperGroup):
    """A command with commands below it: words that name none of those are the arguments of the one that is named like
    the group."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = [ctx.info_name or "", *(args or ["--help"])]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name == ctx.info_name else name), command, rest  # its path is the group's


class CommandGroup(TyperGroup):
    """The commands together."""

    def make_context(self, *arguments: Any, **options: Any) -> typer.Context:
        with _harmless_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: typer.Context) -> Any:
        with _harmless_errors():
            return super().invoke(ctx)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        elif args[:1] == ["version"]:
            args = ["--version"]
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        name = args[0]
        if name not in self.commands and name in _ELSEWHERE:
            raise KimiLiteError(f"There is no command {name!r}.", _ELSEWHERE[name])
        return super().resolve_command(ctx, args)


def _name_of(ctx: typer.Context) -> str:
    """Of the command, or the group that it stands for."""
    return ctx.info_name or (ctx.parent.info_name if ctx.parent is not None else None) or ""


def _is_model(word: str) -> bool:
    """Whether a word that stands where none belongs is rather meant for -m."""
    from kimi_lite.arch.known import find_known

    try:
        return word.endswith(".gguf") or find_known(word.lower()) is not None or Path(word).is_dir()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False


def _say(line: str) -> None:
    from kimi_lite.terminal import echo

    sys.stdout.flush()
    echo(line, to_stderr=True)
