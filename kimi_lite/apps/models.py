"""`kimi-lite models`: the models that are on this machine, whichever program fetched them, with whether they fit; and
deleting one. Flags and printing live here, the work is in `kimi_lite.hub`.

    kimi-lite models
    kimi-lite models --rm unsloth/Kimi-K2.5-GGUF:UD-TQ1_0
"""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_lite.commandline.flags import with_options
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import OUTPUT, Options

if TYPE_CHECKING:
    from kimi_lite.apps.model_table import Row
    from kimi_lite.hub.library import LocalModel

Remove = Annotated[
    str | None, typer.Option("--rm", metavar="NAME", help="Delete a model that kimi-lite fetched; asks first.")
]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]
Force = Annotated[bool, typer.Option("--force", help="Delete also what another program fetched.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.", rich_help_panel=OUTPUT)]


@with_options("models")
def main(
    options: Options, remove: Remove = None, yes: Yes = False, force: Force = False, as_json: AsJson = False
) -> None:
    """List the models on this machine: of the Hugging Face cache, LM Studio, Ollama and llama.cpp."""
    if remove is not None:
        _remove(remove, yes, force)
    else:
        _show(options, as_json)


def _show(options: Options, as_json: bool) -> None:
    from kimi_lite.apps.model_table import table_lines
    from kimi_lite.hub.library import local_models
    from kimi_lite.terminal import echo, width

    models = sorted(local_models(), key=lambda model: (model.name.lower(), model.store))
    rows = [_row(model, options) for model in models]
    if as_json:
        found = [
            row.to_json() | {"path": str(model.path), "is_ours": model.is_ours, "store": model.store}
            for row, model in zip(rows, models, strict=True)
        ]
        typer.echo(json.dumps({"models": found}))
        return
    for line in table_lines(rows, width=width()):
        echo(line)
    if not rows:
        echo("No models are here. kimi-lite pull OWNER/REPO lists what a repository offers; kimi-lite chat has a demo.")


def _row(model: "LocalModel", options: Options) -> "Row":
    from kimi_lite.apps.model_table import Row, make_row
    from kimi_lite.hardware.probe import probe
    from kimi_lite.hub.library import UNFINISHED_LABEL
    from kimi_lite.plan.subject import find_subject
    from kimi_lite.terminal import visible

    place = f"{model.store}{'' if model.repository else f': {model.path}'}"
    name = visible(model.name)
    if model.label == UNFINISHED_LABEL:
        return Row(name, model.num_bytes, problem="an interrupted download: pull goes on with it", place=place)
    if not model.is_whole:
        return Row(name, model.num_bytes, problem="not all of its files are here", place=place)
    if model.is_checkpoint:
        return Row(name, model.num_bytes, problem=f"kimi-lite quantize {model.path}", place=place)
    return make_row(name, model.num_bytes, lambda: find_subject(str(model.path)), probe(model.path), options, place)


def _remove(name: str, is_sure: bool, is_forced: bool) -> None:
    from kimi_lite.hub.library import find_named
    from kimi_lite.hub.removal import plan_removal
    from kimi_lite.terminal import echo, visible
    from kimi_lite.units import counted, gib

    removal = plan_removal(find_named(name), is_forced)
    what = f"{visible(removal.model.name)}: {counted(len(removal.files), 'file')}, {gib(removal.num_bytes)}"
    if not is_sure:
        for file in removal.files:
            echo(f"  {visible(str(file))}", to_stderr=True)
        if not sys.stdin.isatty():
            raise KimiLiteError(f"{what} would be deleted, and there is no terminal to ask on.", "Add --yes.")
        echo(f"Delete {what}? [y/N] ", to_stderr=True, end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise typer.Exit(2)
    removal.run()
    echo(f"deleted {what}")
