"""What a grammar costs: the trie of the vocabulary once, a schema once, a mask for each token, and tokens a second.

    python -m tools.bench.grammar [-m FILE]

Three schemas, each answered greedily with and without its grammar, in turns, from the same prompt. The last line is
JSON.
"""

import argparse
import json
import time
from dataclasses import dataclass

from kimi_lite.demo.build import ensure_demo_model
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.grammar import AnswerForm
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Constraint, Request, SamplingParams

ROUNDS, TOKENS = 5, 96
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
        started_s = time.perf_counter()
        bits = self.constraint.allowed()
        self.masks_s.append(time.perf_counter() - started_s)
        return bits

    def accept(self, token_id: int) -> None:
        self.constraint.accept(token_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", default=None, help="a .gguf file; the demo model where none is given")
    path = parser.parse_args().model or ensure_demo_model()
    with load(path) as engine:
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
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(2 * ROUNDS + 2):
        is_held = i % 2 == 0
        speed = _tok_s(engine, (lambda: Clocked(make(), masks_s)) if is_held else None)
        if i >= 2:  # the first two read the prompt
            speeds[is_held].append(speed)
    held, free = (sorted(speeds[is_held])[ROUNDS // 2] for is_held in (True, False))
    mask_us = [1e6 * mask_s for mask_s in sorted(masks_s)]
    result = {"compile_ms": round(compile_ms, 1), "mask_us_median": round(mask_us[len(mask_us) // 2], 1),
              "mask_us_p99": round(mask_us[int(0.99 * len(mask_us))], 1), "tok_s": round(held, 1),
              "tok_s_without": round(free, 1)}  # fmt: skip
    print(f"{name:<17}" + "  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    return result


def _tok_s(engine: Engine, constraint) -> float:
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=constraint is None)
    ids = tuple(engine.template.encode(QUESTION, thinking=False).ids)
    tokens = list(engine.generate([Request(f"grammar-{time.perf_counter_ns()}", ids, sampling, constraint=constraint)]))
    return tokens[-1].stats.generation_tok_s or 0.0


if __name__ == "__main__":
    main()
