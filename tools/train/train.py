"""A training run: a folder with its settings, metrics and last checkpoint, which goes on after kill -9 bit for bit.

    run = Run.open(Path("run"), Settings(model="small", texts=("emma.txt",)))
    run.train(report=print)

`settings.json` says what was asked for, `tokens.npz` holds the texts, `checkpoint.pt` (replaced as a whole) weights,
optimizers and step, `metrics.jsonl` a line a step. Everything else follows from the step: the learning rate, the
batch. Lines after the last checkpoint are cut off when a run goes on.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import whole_file
from kimi_lite.gguf.metadata import Value
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.convert import open_model
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.tools.train.data import Corpus
from kimi_lite.tools.train.lowbit import LowBit, divergence, is_expert, take_experts
from kimi_lite.tools.train.model import Model, Output, is_factor, load_model, save_checkpoint, save_gguf
from kimi_lite.tools.train.muonclip import TAU, MuonClip, OptimizerName

_FINAL_LR = 0.1  # of the peak
_MAX_NORM = 1.0  # of the gradient
_CHECKPOINT = "checkpoint.pt"
_OF_REPORTS = ("checkpoint_steps", "held_out_steps", "held_out_batches")  # settings that no step depends on


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a run; all of it is in settings.json, and a run goes on only with what gives the same steps: `num_steps` may
    change while the learning rate is stable, and how often something is written or measured always."""

    model: str  # a Hugging Face folder or a GGUF
    texts: tuple[str, ...]
    num_steps: int = 1000
    batch_size: int = 16  # sequences at once
    accumulate: int = 1  # batches a step
    length: int = 256  # tokens of a sequence
    lr: float = 4e-3
    warmup_steps: int = 20
    decay_share: float = 0.3  # of the steps, at the end
    weight_decay: float = 0.1
    optimizer: OptimizerName = "muonclip"
    tau: float = TAU
    token_clip: float = 0.0  # times the median token's gradient, after each layer; 0: none
    is_bf16: bool = True
    seed: int = 0
    trained: str = "all"  # or "experts", or "rest": all but the experts
    low_bit: str = ""  # a GGUF type that the routed experts are rounded to in every forward pass
    calibrated: str = ""  # a file of that type, whose experts are where training begins
    teacher: str = ""  # a model whose distribution is learnt instead of the text
    checkpoint_steps: int = 100
    held_out_steps: int = 100
    held_out_batches: int = 8

    def learning_rate(self, step: int) -> float:
        """Warm-up, stable, decay: a line up, a plateau, half a cosine down to a tenth (WSD)."""
        decay_steps = max(1, round(self.num_steps * self.decay_share))
        decayed = max(0, step - (self.num_steps - decay_steps)) / decay_steps
        shape = _FINAL_LR + (1 - _FINAL_LR) * (1 + math.cos(math.pi * decayed)) / 2
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps)) * shape

    @property
    def factor_dtype(self) -> torch.dtype:
        """In which products take weights and activations."""
        return torch.bfloat16 if self.is_bf16 else torch.float32

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.accumulate * self.length


@dataclass(frozen=True, slots=True)
class Metrics:
    """Of one step. `loss` in nats a token: cross entropy, or the divergence from the teacher; `held_out` the same of
    the text that is held out, where it was measured."""

    step: int
    loss: float
    lr: float
    gradient_norm: float
    max_logits: list[list[float]]  # (L, H)
    loads: list[list[int]]  # (L', E)
    num_clipped: int
    seconds: float  # of the step, without measuring held-out text
    cpu_seconds: float
    held_out: float | None = None

    @property
    def max_logit(self) -> float:
        return max(map(max, self.max_logits))

    @property
    def imbalance(self) -> float:
        """The most loaded expert's load over the mean, the worst layer's; 0 without experts."""
        return max((max(load) * len(load) / max(1, sum(load)) for load in self.loads), default=0.0)


Report = Callable[[Metrics, Settings], None]


@dataclass(slots=True, eq=False)
class Run:
    """`step` is the number of steps done."""

    folder: Path
    settings: Settings
    model: Model
    corpus: Corpus
    optimizer: MuonClip
    low_bit: LowBit | None
    teacher: Model | None
    step: int = 0

    @classmethod
    def open(cls, folder: Path, settings: Settings) -> "Run":
        """A new run, or one that goes on where its last checkpoint was. Raises KimiLiteError."""
        if settings.calibrated and not settings.low_bit:
            raise KimiLiteError(f"{settings.calibrated} is of no type that is trained for.", "Name it by --low-bit.")
        folder.mkdir(parents=True, exist_ok=True)
        _keep_settings(folder, settings)
        model = load_model(Path(settings.model))
        model.token_clip = settings.token_clip
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(settings.trained in ("all", "experts" if is_expert(name) else "rest"))
        if settings.calibrated and settings.trained == "rest":
            take_experts(model, load_model(Path(settings.calibrated)))
        run = cls(
            folder,
            settings,
            model,
            _open_corpus(folder / "tokens.npz", settings),
            MuonClip.of(model, settings.optimizer, settings.weight_decay, settings.tau, not settings.teacher),
            LowBit.of(model, settings.low_bit, settings.factor_dtype) if settings.low_bit else None,
            _load_teacher(Path(settings.teacher), settings.factor_dtype) if settings.teacher else None,
        )
        if settings.calibrated and settings.trained != "rest" and not (folder / _CHECKPOINT).is_file():
            run.low_bit.start_within(load_model(Path(settings.calibrated)))
        run._restore()
        return run

    def train(self, report: Report = lambda metrics, settings: None, until: int | None = None) -> None:
        """Takes the steps that are left, or those before `until`; the last one writes the model as well."""
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            while self.step < min(self.settings.num_steps, until or self.settings.num_steps):
                metrics = self._take_step()
                file.write(json.dumps(asdict(metrics)) + "\n")
                file.flush()
                report(metrics, self.settings)
                if self.step % self.settings.checkpoint_steps == 0 or self.step == self.settings.num_steps:
                    os.fsync(file.fileno())
                    self._save()
        if self.step == self.settings.num_steps:
            self.write_model()

    def _take_step(self) -> Metrics:
        s, start_s, start_cpu_s = self.settings, time.perf_counter(), time.process_time()
        weights = self.low_bit.rounded() if self.low_bit else {}
        loss, max_logits, loads = 0.0, None, None
        for part in range(s.accumulate):
            ids = self.corpus.batch(self.step * s.accumulate + part, s.batch_size, s.length, s.seed)
            part_loss, output = self._loss(ids, weights)
            (part_loss / s.accumulate).backward()
            loss += float(part_loss.detach()) / s.accumulate
            max_logits = output.max_logits if max_logits is None else torch.maximum(max_logits, output.max_logits)
            loads = output.loads if loads is None else loads + output.loads
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, _MAX_NORM)
        lr = s.learning_rate(self.step)
        num_clipped = self.optimizer.step(lr, max_logits, loads)
        self.step += 1
        seconds, cpu_seconds = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        is_measured = self.step % s.held_out_steps == 0 or self.step == s.num_steps
        return Metrics(
            step=self.step,
            loss=loss,
            lr=lr,
            gradient_norm=float(norm),
            max_logits=max_logits.tolist(),
            loads=loads.tolist(),
            num_clipped=num_clipped,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            held_out=self.held_out_loss() if is_measured else None,
        )

    def _loss(self, ids: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Output]:
        """Of ids (B, T + 1): the mean nats of the T predictions. `weights` are used in place of the model's own."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        with self._precision():
            output = self.low_bit.forward(inputs, weights) if self.low_bit else self.model(inputs)
            if self.teacher is None:
                return cross_entropy(output.logits.float().flatten(0, 1), targets.flatten()), output
            with torch.no_grad():
                wanted = self.teacher(inputs).logits
            return divergence(wanted, output.logits), output

    def _precision(self) -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16) if self.settings.is_bf16 else nullcontext()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean nats a token, of what the steps lower, on the text that is held out."""
        s, weights = self.settings, self.low_bit.rounded() if self.low_bit else {}
        losses = [
            float(self._loss(ids, weights)[0])
            for ids in self.corpus.held_out_batches(s.batch_size, s.length, s.held_out_batches)
        ]
        return sum(losses) / len(losses)

    def write_model(self) -> Path:
        """As the source is: a Hugging Face folder with its tokenizer, or a GGUF with its metadata; both float32."""
        source = Path(self.settings.model)
        if (source / "config.json").is_file():
            save_checkpoint(self.model, self.folder / "model", tokenizer=source)
            return self.folder / "model"
        save_gguf(self.model, self.folder / "model.gguf", read_metadata(source))
        return self.folder / "model.gguf"

    def _save(self) -> None:
        state = {"step": self.step, "model": self._moving(), "optimizer": self.optimizer.state_dict()}
        with whole_file(self.folder / _CHECKPOINT, "wb") as file:
            torch.save(state, file)

    def _moving(self) -> dict[str, Tensor]:
        """What steps change: the weights that are trained, and the biases that balance experts."""
        trained = {name: weight.detach() for name, weight in self.model.named_parameters() if weight.requires_grad}
        return trained | dict(self.model.named_buffers())

    def _restore(self) -> None:
        path = self.folder / _CHECKPOINT
        if path.is_file():
            state = torch.load(path, weights_only=True)
            self.step = state["step"]
            for name, weight in self._moving().items():
                weight.copy_(state["model"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        kept = [metrics for metrics in read_metrics(self.folder) if metrics.step <= self.step]
        with whole_file(self.folder / "metrics.jsonl") as file:
            file.writelines(json.dumps(asdict(metrics)) + "\n" for metrics in kept)


def read_metrics(folder: Path) -> Iterator[Metrics]:
    """The steps of a run, without a line that was cut off."""
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else ():
        if line.endswith("\n"):
            yield Metrics(**json.loads(line))


def read_metadata(model: Path) -> dict[str, Value]:
    """Of a GGUF as it stands, or as a Hugging Face folder would be converted: names and the tokenizer."""
    return dict(open_model(model).make_metadata(BY_NAME["F32"]))


def _load_teacher(path: Path, dtype: torch.dtype) -> Model:
    """What products take of it as `dtype`."""
    teacher = load_model(path).requires_grad_(False)
    for name, weight in teacher.named_parameters():
        if is_factor(name):
            weight.data = weight.data.to(dtype)
    return teacher


def _keep_settings(folder: Path, settings: Settings) -> None:
    path = folder / "settings.json"
    stated = json.loads(json.dumps(asdict(settings)))
    if path.is_file():
        unsaid = asdict(Settings(model="", texts=()))  # what earlier versions did not ask for
        before = unsaid | json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in stated if before[name] != stated[name] and name not in _OF_REPORTS]
        if changed == ["num_steps"]:
            earlier, done = replace(settings, num_steps=before["num_steps"]), sum(1 for _ in read_metrics(folder))
            if all(earlier.learning_rate(step) == settings.learning_rate(step) for step in range(done)):
                changed = []
        if changed:
            what = ", ".join(f"{name} {before[name]!r} and not {stated[name]!r}" for name in changed)
            raise KimiLiteError(f"{folder} was begun with {what}.", "Say the same, or name another folder.")
    with whole_file(path) as file:
        json.dump(stated, file, indent=1)


def _open_corpus(path: Path, settings: Settings) -> Corpus:
    """The texts as they were when the run began."""
    if not path.is_file():
        metadata = {key: value.value for key, value in read_metadata(Path(settings.model)).items()}
        corpus = Corpus.of(
            [Path(text) for text in settings.texts], Tokenizer.from_metadata(_as_arrays(metadata)), settings.length
        )
        with whole_file(path, "wb") as file:
            np.savez(file, train=corpus.train, held_out=corpus.held_out)
    with np.load(path) as arrays:
        return Corpus(arrays["train"], arrays["held_out"])


def _as_arrays(metadata: dict[str, object]) -> dict[str, object]:
    """Token types as a reader of files has them."""
    kinds = metadata["tokenizer.ggml.token_type"]
    return metadata | {"tokenizer.ggml.token_type": np.asarray(kinds)}
