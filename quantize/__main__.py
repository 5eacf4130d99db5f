"""`python -m quantize SRC DST --type q8_0`: the same work as `kimi-lite quantize`, which calls `main` too."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kimi_lite.errors import KimiLiteError


def main(
    src: Annotated[Path, typer.Argument(help="A Hugging Face folder: config.json, safetensors, tokenizer.")],
    dst: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    type_name: Annotated[str, typer.Option("--type", help="f32, f16, bf16, q8_0; others need the ggml extra.")] = "q8_0",
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
) -> None:
    """Convert a checkpoint of the deepseek family (Kimi K2 to K2.6, Moonlight, DeepSeek) to one GGUF file."""
    from quantize.convert import convert

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("checking")

        def show(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        report = convert(src, dst, type_name, show, force)
    for note in report.notes:
        console.print(f"note: {note}")
    types = ", ".join(f"{count} {name}" for name, count in report.tensors_by_type.items())
    console.print(
        f"{report.path}: {report.num_bytes / 1e9:.3f} GB, {report.num_weights / 1e6:,.1f} M weights at "
        f"{report.bits_per_weight:.2f} bits, {report.num_tensors} tensors ({types}), {report.seconds:.1f} s"
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except KimiLiteError as error:
        typer.echo(f"quantize: {error}", err=True)
        sys.exit(2)
