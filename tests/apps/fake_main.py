"""`python -m tests.apps.fake_main ARGS`: kimi-lite with a scripted model in place of a real one.

It thinks "about it", then repeats what it was told. Told "slow" it talks for long, told "long prompt" it takes its time
to read, told "deaf" it cannot be stopped gently. It touches the file $FAKE_BEGUN when it begins to work, $FAKE_TALKING
when it has said some words.
"""

import os
import time
from pathlib import Path

from kimi_lite import cli
from kimi_lite.apps import opening
from kimi_lite.engine.engine import Engine
from kimi_lite.options import Options
from tests.engine.fakes import fake_engine, scripted_logits

SECONDS_PER_STEP = 0.03
NUM_WORDS = 20  # tokens, more than it thinks


def repeat(prompt: str) -> tuple[str, str]:
    """(reasoning, content) for a prompt as the template renders it."""
    said = prompt.rpartition("<|im_user|>user<|im_middle|>")[2].removesuffix("<|im_end|>")
    return "about it", "tick " * 400 if said.startswith("slow") else f"you said: {said}"


def open_fake(path: object, options: Options, on_progress: object = None) -> Engine:
    """In place of `engine.loader.load`."""
    engine = fake_engine(context_length=options.context_length or 4096, max_step_tokens=64)
    engine.model.next_logits = scripted_logits(engine.tokenizer, repeat)
    engine.opened_with = (path, options)

    def take_time(batch, layer: int) -> None:
        if "FAKE_BEGUN" in os.environ:
            Path(os.environ["FAKE_BEGUN"]).touch()
        sequence = engine.scheduler.running[0]
        if "FAKE_TALKING" in os.environ and sequence.num_generated > NUM_WORDS:
            Path(os.environ["FAKE_TALKING"]).touch()
        known = engine.tokenizer.decode(engine.scheduler.running[0].token_ids[:200])
        if layer == 0 and "long prompt" in known:
            time.sleep(10 * SECONDS_PER_STEP)
        elif layer == 0 and "slow" in known:
            time.sleep(SECONDS_PER_STEP)
        elif "deaf" in known:
            time.sleep(60)

    engine.model.before_layer = take_time
    return engine


if __name__ == "__main__":
    opening.load = open_fake
    cli.main()
