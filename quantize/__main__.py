"""`python -m quantize SRC DST --recipe tq1_0`: the same work as `kimi-lite quantize`, whose command is `main` too.

Only flags live here; the work is imported when it begins.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kimi_lite.errors import KimiLiteError
from kimi_lite.units import DECIMAL_HELP, SIZE_HELP

Src = Annotated[Path, typer.Argument(help="A Hugging Face folder (config.json, safetensors, tokenizer), or GGUF.")]
Dst = Annotated[
    Path, typer.Argument(help="The GGUF file to write: NAME.gguf, or NAME-00001-of-0000N.gguf where it is large.")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="Type of the routed experts (tq1_0, iq1_m, q2_k, ...), rest Q8_0; q4_0-lossless; lite2_128: GSQ's 2 bits "
        "in 2.125, for kimi-lite alone; a file of REGEX=TYPE.",
    ),
]
TypeName = Annotated[
    str | None, typer.Option("--type", help="One type for every matrix. K, IQ types need the ggml extra.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--tensor-type", metavar="REGEX=TYPE", help="Exception by tensor name; repeatable.")
]
Imatrix = Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix of kimi-lite or llama.cpp.")]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate", help="Run the source on this text and fit all types to it: best text of all kinds of use."
    ),
]
CalibrateChunks = Annotated[int, typer.Option("--chunks", help="Of 512 tokens of that text; 0: up to 64.", min=0)]
MaxRam = Annotated[
    str | None, typer.Option("--max-ram", metavar="SIZE", help=f"Most memory to use, e.g. 6G. {SIZE_HELP}.")
]
Mmproj = Annotated[
    str | None,
    typer.Option("--mmproj", metavar="TYPE", help="Vision tower to mmproj-NAME.gguf as well: bf16, f16, q8_0, f32."),
]
CheckSource = Annotated[
    bool, typer.Option("--check-source", help="First compare the source with its repository's checksums.")
]
SplitSize = Annotated[str, typer.Option("--split-max-size", help=f"Largest file, e.g. 45G or 500M. {DECIMAL_HELP}.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print types, sizes and time; read no weights, write nothing.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Read all back: checksums, errors, perplexity next to the source's.")
]
FitInto = Annotated[
    str | None, typer.Option("--fit", metavar="VRAM+RAM", help="Best types for e.g. 24G+256G, or `this` machine.")
]
FileSize = Annotated[
    str | None, typer.Option("--size", help=f"Best types for a file of at most SIZE, e.g. 250G. {DECIMAL_HELP}.")
]
SensitivityTable = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity", metavar="TABLE", help="What each tensor is worth, for --fit and --size. K2.5's: known."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--write-recipe", metavar="FILE", help="Write the chosen types for --recipe FILE.")
]
MeasuredOn = Annotated[
    Path | None,
    typer.Option(
        "--measure-sensitivity",
        metavar="TEXT",
        help="Write what each part of SRC (GGUF) is worth as a table DST: on this text, layer by layer. No model.",
    ),
]
Probe = Annotated[
    str | None, typer.Option("--probe", metavar="TYPE", help="That measurement's coarse type. Default: q2_0.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists, or its unfinished part.")]


def main(
    src: Src,
    dst: Dst,
    recipe: RecipeName = None,
    type_name: TypeName = None,
    fit: FitInto = None,
    size: FileSize = None,
    sensitivity: SensitivityTable = None,
    write_recipe: RecipeFile = None,
    measure_sensitivity: MeasuredOn = None,
    probe: Probe = None,
    tensor_types: Overrides = None,
    imatrix: Imatrix = None,
    calibrate: Calibrate = None,
    chunks: CalibrateChunks = 0,
    max_ram: MaxRam = None,
    mmproj: Mmproj = None,
    split_size: SplitSize = "45G",
    check_source: CheckSource = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    force: Force = False,
) -> None:
    """Convert a model of the deepseek family (Kimi K2 to K2.6, Moonlight, DeepSeek) to GGUF. Resumes after an
    interruption."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from kimi_lite.quantize.app import Settings, run
    from kimi_lite.terminal import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    settings = Settings(
        src=src,
        dst=dst,
        recipe=recipe,
        type_name=type_name,
        tensor_types=tuple(tensor_types or ()),
        imatrix=imatrix,
        split_size=split_size,
        is_overwriting=force,
        fit=fit,
        calibrate=calibrate,
        calibrate_chunks=chunks,
        max_ram=max_ram,
        mmproj=mmproj,
        sensitivity=sensitivity,
        size=size,
        recipe_file=write_recipe,
        measured_on=measure_sensitivity,
        probe=probe,
        checks_source=check_source,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checking")

        def show(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        lines = run(settings, show, dry_run, verify)
    for line in lines:
        console.print(line)


if __name__ == "__main__":
    try:
        typer.run(main)
    except KimiLiteError as error:
        from kimi_lite.terminal import echo

        echo(f"quantize: {error}", to_stderr=True)
        sys.exit(2)
