"""What a grammar costs: the trie of the vocabulary once, a schema once, a mask for each token, and tokens a second.

    python -m tools.bench.grammar [-m FILE]

Three schemas, each answered greedily with and without its grammar, in turns, from the same prompt, on one thread. Masks
and tokens are also measured in CPU time, which other programs change little. The last line is JSON.
"""

import argparse
import json
import time
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from kimi_lite.demo.build import ensure_demo_model
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.grammar import AnswerForm
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Constraint, Request, SamplingParams
from kimi_lite.options import Options

ROUNDS, TOKENS = 5, 64
QUESTION = [{"role": "user", "content": "Describe five cities as JSON, with many words."}]
_FIELDS = {f"field_{i}": {"type": ("string", "integer", "number")[i % 3]} for i in range(40)}
_CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["name"],
}
SCHEMAS = {
    "any object": {"type": "object"},
    "a list of cities": {"type": "array", "items": _CITY, "minItems": 5},
    "40 fields": {"type": "object", "properties": _FIELDS, "required": list(_FIELDS), "additionalProperties": False},
}


@dataclass(slots=True)
class Clocked:
    """A constraint that measures itself."""

    constraint: Constraint
    masks_s: list[float]

    def allowed(self):
        started_s = time.thread_time()
        bits = self.constraint.allowed()
        self.masks_s.append(time.thread_time() - started_s)
        return bits

    def accept(self, token_id: int) -> None:
        self.constraint.accept(token_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", default=None, help="a .gguf file; the demo model where none is given")
    path = parser.parse_args().model or ensure_demo_model()
    with load(path, Options(num_threads=1)) as engine:
        started_s = time.perf_counter()
        engine.grammars.warm()
        figures = {"trie_s": round(time.perf_counter() - started_s, 3), "vocabulary": engine.tokenizer.vocab_size}
        print(f"the trie of {figures['vocabulary']:,} tokens: {figures['trie_s']} s")
        figures["schemas"] = {name: _measured(engine, name, schema) for name, schema in SCHEMAS.items()}
    print(json.dumps(figures))


def _measured(engine: Engine, name: str, schema: dict) -> dict[str, float]:
    started_s = time.perf_counter()
    make = engine.grammars.answer(AnswerForm(schema=schema))
    compile_ms = 1e3 * (time.perf_counter() - started_s)
    masks_s: list[float] = []
    speeds: dict[bool, list[Speed]] = {True: [], False: []}
    for i in range(2 * ROUNDS + 2):
        is_held = i % 2 == 0
        speed = _speed(engine, (lambda: Clocked(make(), masks_s)) if is_held else None)
        if i >= 2:  # the first two read the prompt
            speeds[is_held].append(speed)
    held, free = (Speed(*map(median, zip(*speeds[is_held], strict=True))) for is_held in (True, False))
    mask_us = [1e6 * mask_s for mask_s in sorted(masks_s)]
    result = {"compile_ms": round(compile_ms, 1), "mask_us_median": round(mask_us[len(mask_us) // 2], 1),
              "mask_us_p99": round(mask_us[int(0.99 * len(mask_us))], 1), "tok_s": round(held.tok_s, 1),
              "tok_s_without": round(free.tok_s, 1), "cpu_ms": round(held.cpu_ms, 2),
              "cpu_ms_without": round(free.cpu_ms, 2)}  # fmt: skip
    print(f"{name:<17}" + "  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    return result


class Speed(NamedTuple):
    tok_s: float
    cpu_ms: float  # of a token


def _speed(engine: Engine, constraint) -> Speed:
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=constraint is None)
    ids = tuple(engine.template.encode(QUESTION, thinking=False).ids)
    tokens = engine.generate([Request(f"grammar-{time.perf_counter_ns()}", ids, sampling, constraint=constraint)])
    next(tokens)
    started_s = time.process_time()
    *_, last = tokens
    cpu_ms = 1e3 * (time.process_time() - started_s) / max(last.stats.generated_tokens - 1, 1)
    return Speed(last.stats.generation_tok_s or 0.0, cpu_ms)


if __name__ == "__main__":
    main()
