"""`kimi-lite imatrix`: measures which columns of each weight matter over a text. Flags and progress; the work is in
`quantize.calibrate.statistics`, imported when it begins.
"""

from pathlib import Path
from typing import Annotated

import typer

ModelFile = Annotated[
    Path, typer.Option("-m", "--model", help="GGUF file, first shard or folder; best unquantized or Q8_0.")
]
TextFile = Annotated[Path, typer.Option("-f", "--file", help="A text like what the model will be used for.")]
OutputFile = Annotated[
    Path, typer.Option("-o", "--output", help="The importance matrix to write (GGUF, as llama.cpp's).")
]
Chunks = Annotated[int, typer.Option("--chunks", help="Chunks of the text to use; 0: all.", min=0)]
ChunkTokens = Annotated[int, typer.Option("-c", "--ctx", help="Tokens in a chunk, up to 512.")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads. Default: all cores.", min=1)]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


def main(
    model: ModelFile,
    text: TextFile,
    output: OutputFile = Path("imatrix.gguf"),
    chunks: Chunks = 0,
    chunk_tokens: ChunkTokens = 512,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Measure importance over a text, for quantize --imatrix and for llama.cpp. Layer by layer: also models beyond
    memory."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kimi_lite.quantize.calibrate.statistics import collect_importance
    from kimi_lite.terminal import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("checking", total=None)

        def show(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        paths = (model.expanduser(), text.expanduser(), output.expanduser())
        lines = collect_importance(*paths, chunks, chunk_tokens, threads, force, show)
        progress.remove_task(task)
    for line in lines:
        console.print(line)
