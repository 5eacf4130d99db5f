"""`kimi-lite imatrix`: measures which columns of each weight matter over a text. Flags and progress; the work is in
`quantize.calibrate.statistics`, imported when it begins.
"""

from pathlib import Path
from typing import Annotated

import typer

from kimi_lite.commandline.flags import with_options
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options


@with_options("imatrix")
def main(
    options: Options,
    text: Annotated[Path, typer.Option("-f", "--file", help="A text like what the model will be used for.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The importance matrix to write (GGUF, as llama.cpp's).")
    ] = Path("imatrix.gguf"),
    chunks: Annotated[int, typer.Option("--chunks", help="Chunks of the text to use; 0: all.", min=0)] = 0,
    chunk_tokens: Annotated[int, typer.Option("-c", "--ctx", help="Tokens in a chunk, up to 512.")] = 512,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Measure importance over a text, for quantize --imatrix and for llama.cpp. Layer by layer: also models beyond
    memory."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kimi_lite.hub.names import is_hub_name
    from kimi_lite.hub.resolve import find_or_fetch
    from kimi_lite.plan.subject import require_no_bare_name
    from kimi_lite.quantize.calibrate.statistics import collect_importance
    from kimi_lite.terminal import Console

    if options.model is None:
        raise KimiLiteError(
            "No model is named.", "Give -m FILE: a GGUF, best unquantized or Q8_0, or a checkpoint's folder."
        )
    if not is_hub_name(options.model):
        require_no_bare_name(options.model)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checking", total=None)

        def show(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        path = Path(options.model).expanduser()
        if is_hub_name(options.model):
            path = find_or_fetch(options.model, options, show)
        lines = collect_importance(
            path,
            text.expanduser(),
            output.expanduser(),
            max_chunks=chunks,
            chunk_tokens=chunk_tokens,
            num_threads=options.num_threads,
            is_overwriting=force,
            on_layer=show,
        )
        progress.remove_task(task)
    for line in lines:
        console.print(line)
