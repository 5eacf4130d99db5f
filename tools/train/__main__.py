"""Training models of the architecture with MuonClip: `python -m tools.train COMMAND --help`.

python -m tools.train texts corpus                                      # texts that may be redistributed
python -m tools.train new small --text corpus/shakespeare.txt           # a small random model and its tokenizer
python -m tools.train run first small --text corpus/shakespeare.txt     # train it; again after kill -9: it goes on
python -m tools.train plot first.svg first
kimi-lite quantize first/model first.gguf --type q8_0
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kimi_lite.engine.scoring import TEXT
from kimi_lite.errors import KimiLiteError
from kimi_lite.terminal import echo

app = typer.Typer(
    help="Train models of the architecture with MuonClip.",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_TRIED = ["muonclip:0.01", "adamw:0.004"]
_OPTIMIZERS = ("muonclip", "muon", "adamw")
_LINE = 100  # columns: longer than any line before it
_Texts = Annotated[list[Path], typer.Option("--text", help="Text files; the end of each is held out.")]


@contextmanager
def _errors_shown() -> Iterator[None]:
    try:
        yield
    except KimiLiteError as error:
        echo(f"train: {error}", to_stderr=True)
        sys.exit(2)


@app.command()
def texts(folder: Annotated[Path, typer.Argument(help="Where they go.")]) -> None:
    """Download texts that may be redistributed of seven kinds (32 M characters); SOURCES.md names their licences."""
    from kimi_lite.tools.texts import fetch_texts

    with _errors_shown():
        for path in fetch_texts(folder):
            echo(f"{path}: {path.stat().st_size:,} bytes")


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
    text: _Texts = [TEXT],  # noqa: B006
    vocab: Annotated[int, typer.Option(help="Tokens, with 256 control tokens.", min=512)] = 4096,
    layers: Annotated[int, typer.Option(help="Of which the first is dense.", min=2)] = 6,
    hidden: Annotated[int, typer.Option(help="Width, a multiple of 256.", min=256)] = 256,
    heads: Annotated[int, typer.Option(help="Attention heads.", min=1)] = 4,
    experts: Annotated[int, typer.Option(help="Routed experts a layer.", min=2)] = 16,
    top: Annotated[int, typer.Option(help="Of which a token uses.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a small model with random weights and a tokenizer learnt from the texts."""
    from kimi_lite.tools.train.data import write_tokenizer
    from kimi_lite.tools.train.model import Model, save_checkpoint, small_config

    with _errors_shown():
        model = Model(small_config(folder.name, vocab, layers, hidden, heads, experts, top)).initialize(seed)
        write_tokenizer(folder, text, vocab)
        save_checkpoint(model, folder)
        config = model.config
        echo(f"{folder}: {config.total_parameters / 1e6:.1f} M weights, {config.active_parameters / 1e6:.1f} M active")


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Of the run: a new one, or one that goes on.")],
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder or a GGUF to start from.", exists=True)],
    text: _Texts = [TEXT],  # noqa: B006
    steps: Annotated[int, typer.Option(help="In all.", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 16,
    accumulate: Annotated[int, typer.Option(help="Batches a step.", min=1)] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate, of all weights.", min=0)] = 4e-3,
    warmup: Annotated[int, typer.Option(help="Steps of the way up.", min=0)] = 20,
    decay: Annotated[float, typer.Option(help="Share of the steps on the way down.", min=0, max=1)] = 0.3,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.", min=0)] = 0.1,
    optimizer: Annotated[str, typer.Option(help="muonclip, muon (without QK-Clip) or adamw.")] = "muonclip",
    tau: Annotated[float, typer.Option(help="QK-Clip's bound of attention logits.", min=0)] = 100.0,
    token_clip: Annotated[
        float, typer.Option(help="Of a token's gradient after each layer, in medians of all tokens; 0: none.", min=0)
    ] = 0.0,
    bf16: Annotated[bool, typer.Option("--bf16/--f32", help="Products in bfloat16.")] = True,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    trained: Annotated[
        str, typer.Option(help="all, experts, or rest, which is all but these: which weights move.")
    ] = "all",
    low_bit: Annotated[str, typer.Option(help="A GGUF type that the routed experts are rounded to.")] = "",
    calibrated: Annotated[
        Path | None,
        typer.Option(
            help="A file of that type, by quantize --calibrate: start at its experts; with --trained rest keep them.",
            exists=True,
        ),
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="Learn this model's distribution.", exists=True)] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 100,
    measure_every: Annotated[int, typer.Option(help="Steps between looks at held-out text.", min=1)] = 100,
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads.", min=1)] = None,
) -> None:
    """Train, or go on training: the same command after kill -9 gives the same weights as without."""
    import torch

    from kimi_lite.tools.train.train import Run, Settings

    with _errors_shown():
        _check_choice(optimizer, _OPTIMIZERS, "--optimizer")
        _check_choice(trained, ("all", "experts", "rest"), "--trained")
        if threads:
            torch.set_num_threads(threads)
        settings = Settings(
            model=str(model), texts=tuple(map(str, text)), num_steps=steps, batch_size=batch, accumulate=accumulate,
            length=length, lr=lr, warmup_steps=warmup, decay_share=decay, weight_decay=weight_decay,
            optimizer=optimizer, tau=tau, token_clip=token_clip, is_bf16=bf16, seed=seed, trained=trained,
            low_bit=low_bit, calibrated=str(calibrated or ""), teacher=str(teacher or ""), checkpoint_steps=save_every,
            held_out_steps=measure_every,
        )  # fmt: skip
        begun = Run.open(folder, settings)
        begun.train(_Progress(begun.step))
        echo(f"{folder}: {begun.step} steps done")


def _check_choice(value: str, choices: tuple[str, ...], flag: str) -> str:
    if value not in choices:
        raise KimiLiteError(f"{flag} is {value!r}.", f"Choose one of {', '.join(choices)}.")
    return value


class _Progress:
    """A line that is written over on a terminal, else one now and then."""

    def __init__(self, first_step: int) -> None:
        self.first_step, self.start_s, self.shown_s = first_step, time.perf_counter(), 0.0

    def __call__(self, metrics, settings) -> None:
        now_s = time.perf_counter()
        is_terminal, is_last = sys.stderr.isatty(), metrics.step == settings.num_steps
        if not is_last and now_s - self.shown_s < (0.2 if is_terminal else 30):
            return
        self.shown_s = now_s
        rate = (metrics.step - self.first_step) / (now_s - self.start_s)  # steps a second
        left = (settings.num_steps - metrics.step) / rate
        line = (
            f"step {metrics.step} of {settings.num_steps}  loss {metrics.loss:.4f}  largest logit "
            f"{metrics.max_logit:.1f}  {rate * settings.step_tokens:,.0f} tokens/s  {left / 60:.1f} min left"
        )
        ends_here = is_last or not is_terminal
        echo(line.ljust(_LINE), to_stderr=True, end="\n" if ends_here else "\r")


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="Where the runs go; it goes on where it was stopped.")],
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder or a GGUF to start from.", exists=True)],
    text: _Texts = [TEXT],  # noqa: B006
    tried: Annotated[list[str], typer.Option("--try", help="OPTIMIZER:LR, several times.")] = _TRIED,
    minutes: Annotated[float, typer.Option(help="CPU time of each run.", min=0)] = 5,
    seeds: Annotated[int, typer.Option(help="Runs of each setting.", min=1)] = 3,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 256,
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads.", min=1)] = None,
) -> None:
    """Train the same model with several optimizers for the same CPU time; held-out loss of each, best first."""
    import torch

    from kimi_lite.tools.train.compare import compare as train_all
    from kimi_lite.tools.train.train import Settings

    with _errors_shown():
        settings = [_read_setting(each) for each in tried]
        if threads:
            torch.set_num_threads(threads)
        folder.mkdir(parents=True, exist_ok=True)
        base = Settings(model=str(model), texts=tuple(map(str, text)), batch_size=batch, length=length)
        trials = train_all(
            folder, base, settings, minutes * 60, seeds, _Progress(0), lambda trial: echo(str(trial), to_stderr=True)
        )
        for trial in trials:
            echo(str(trial))


def _read_setting(text: str) -> tuple[str, float]:
    name, _, lr = text.partition(":")
    try:
        return _check_choice(name, _OPTIMIZERS, "--try"), float(lr)
    except ValueError:
        raise KimiLiteError(f"--try is {text!r}.", "Write it as muonclip:0.01.") from None


@app.command()
def plot(
    picture: Annotated[Path, typer.Argument(help="The .svg or .png to write.")],
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", exists=True, file_okay=False)],
) -> None:
    """Draw loss, largest attention logit and expert load of runs."""
    from kimi_lite.tools.train.plots import describe, draw_runs
    from kimi_lite.tools.train.train import read_metrics

    with _errors_shown():
        draw_runs(picture, runs)
        for folder in runs:
            echo(f"{folder}: {describe(list(read_metrics(folder)))}")


if __name__ == "__main__":
    app()
