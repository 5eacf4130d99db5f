"""Multiple choice, scored by likelihood: of the answers to a question, the model's is the one it finds likeliest.

The questions (tools/data/choices.jsonl) are easy on purpose: a small or badly quantized model must still differ from
chance.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_lite.engine.scoring import Estimate, log_softmax, losses
from kimi_lite.text.tokenizer import Tokenizer

CHOICES = Path(__file__).parents[1] / "data" / "choices.jsonl"
Logits = Callable[[np.ndarray, int], np.ndarray]  # (ids (T,), first) -> (T - first, vocabulary)


@dataclass(frozen=True, slots=True)
class Question:
    question: str
    choices: tuple[str, ...]
    answer: int  # index

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Shares of right answers, by the likelihood of the whole answer and by that of its average byte."""

    num_questions: int
    accuracy: Estimate
    accuracy_per_byte: Estimate
    chance: float


def load_questions(path: Path = CHOICES) -> list[Question]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(record["question"], tuple(record["choices"]), record["answer"]) for record in records]


def answer_all(logits: Logits, tokenizer: Tokenizer, bos_id: int | None, questions: list[Question]) -> TaskResult:
    """Every choice is one pass over question and answer."""
    is_right, is_right_per_byte = [], []
    for question in questions:
        likelihoods = np.array(
            [_likelihood(logits, tokenizer, bos_id, question.prompt, choice) for choice in question.choices]
        )
        num_bytes = np.array([len(choice.encode()) for choice in question.choices])
        is_right.append(likelihoods.argmax() == question.answer)
        is_right_per_byte.append((likelihoods / num_bytes).argmax() == question.answer)
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    return TaskResult(len(questions), Estimate.of(is_right), Estimate.of(is_right_per_byte), chance)


def _likelihood(logits: Logits, tokenizer: Tokenizer, bos_id: int | None, prompt: str, choice: str) -> float:
    """Log-probability in nats of the choice after the prompt."""
    start = [*([] if bos_id is None else [bos_id]), *tokenizer.encode(prompt)]
    answer = tokenizer.encode(f" {choice}")
    rows = logits(np.array(start + answer[:-1], np.int32), len(start) - 1)
    return -float(losses(log_softmax(rows), np.array(answer)).sum())
