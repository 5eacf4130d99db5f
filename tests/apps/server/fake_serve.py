"""`python -m tests.apps.server.fake_serve ARGS`: `kimi-lite serve` with a scripted model.

It repeats what it was told; told "slow" it talks for long, told "crash" its engine breaks, told "stuck" it stands
still. $FAKE_LOADS_S: how long it loads; $FAKE_LOADED_S: how soon the command sees that it is loaded. It touches the
file $FAKE_CLOSED when it is closed as it should be.
"""

import os
import time
from pathlib import Path

from kimi_lite import cli
from kimi_lite.apps.server import command
from kimi_lite.engine.engine import Engine, OnProgress
from kimi_lite.options import Options
from tests.apps.fake_main import repeat
from tests.engine.fakes import fake_engine, scripted_logits

SECONDS_PER_TOKEN = 0.02


def open_fake(path: object, options: Options, on_progress: OnProgress) -> Engine:
    """In place of `engine.loader.load`."""
    until = time.monotonic() + float(os.environ.get("FAKE_LOADS_S", "0"))
    while time.monotonic() < until:
        on_progress("reading weights", 1, 4)
        time.sleep(0.05)
    engine = fake_engine(context_length=4096, num_pages=512, max_running=options.num_sequences)
    engine.model.next_logits = scripted_logits(engine.tokenizer, repeat)

    def behave(batch, layer: int) -> None:
        told = engine.tokenizer.decode(engine.scheduler.running[0].token_ids[:200])
        assert "crash" not in told, "/home/user/secret"
        if layer == 0 and "slow" in told:
            time.sleep(SECONDS_PER_TOKEN)
        if "stuck" in told:
            time.sleep(60)

    engine.model.before_layer = behave
    if "FAKE_CLOSED" in os.environ:
        engine.model.close = Path(os.environ["FAKE_CLOSED"]).touch
    return engine


if __name__ == "__main__":
    command.load = open_fake
    command._LOADED_S = float(os.environ.get("FAKE_LOADED_S", command._LOADED_S))
    command.find_model = lambda options, on_progress: options.model
    cli.main()
