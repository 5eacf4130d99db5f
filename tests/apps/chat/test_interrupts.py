"""Ctrl-C at any moment of reading and answering: it stops at once, what was said stays, and the next answer is right.

The scripted model reads everything it says back from the cache and fails when a row is stale; see `tests.engine.fakes`.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.apps.talk import Talk
from tests.engine.fakes import scripted_logits

NUM_INTERRUPTS = 50
PROMPT = "please go on " * 24  # a dozen steps of the scripted engine
SECONDS_PER_LAYER = 0.001


def answer(prompt: str) -> tuple[str, str]:
    """`number 7 it is, and so on` for a message that begins with 7."""
    said = prompt.rpartition("<|im_user|>user<|im_middle|>")[2].removesuffix("<|im_end|>")
    return "", f"number {said.split()[0]} it is, and so on"


@pytest.fixture(autouse=True)
def _late_signals_are_ignored() -> Iterator[None]:
    """Those that come when the chat has handed back to the test."""
    previous = signal.signal(signal.SIGINT, lambda signum, frame: None)
    yield
    signal.signal(signal.SIGINT, previous)


def test_a_late_interrupt_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between the last token and the prompt, while the conversation is saved."""
    talk = Talk(tmp_path, capsys)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    save = talk.chat.autosave.save

    def save_and_interrupt() -> None:
        if talk.session.turns[-1].role == "assistant":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        save()

    talk.chat.autosave.save = save_and_interrupt
    talk.say("hi")
    talk.chat.commands.add(
        replace(talk.chat.commands.by_name["ctx"], names=("raise",), action=lambda *_: signal.raise_signal(2))
    )
    talk.say("/raise", "there")
    assert [turn.text for turn in talk.session.turns] == ["hi", "you said: hi", "there", "you said: there"]
    assert talk.store.read(talk.chat.autosave.name)["turns"][-1]["content"] == "you said: there"
    talk.chat.autosave.close()


def test_an_interrupt_while_the_message_is_saved_stops_its_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(tmp_path, capsys)
    save = talk.chat.autosave.save
    talk.chat.autosave.save = lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.05), save())
    shown = talk.say("hi")
    assert "stopped" in shown
    assert [turn.text for turn in talk.session.turns][:1] == ["hi"]
    assert talk.store.read(talk.chat.autosave.name)["turns"][0]["content"] == "hi"
    talk.chat.autosave.close()


def test_fifty_interrupts_at_random_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(tmp_path, capsys, context_length=8192)
    talk.session.engine.scheduler.max_step_tokens = 32
    talk.session.engine.model.next_logits = scripted_logits(talk.session.engine.tokenizer, answer)
    talk.session.engine.model.before_layer = lambda batch, layer: time.sleep(SECONDS_PER_LAYER)
    talk.session.set_thinking(False)
    began_s = time.monotonic()
    talk.say(f"0 {PROMPT}")
    talk.say("/clear")
    whole_s = time.monotonic() - began_s
    chance = random.Random(7)
    endings = {"stopped while reading": 0, "stopped while answering": 0, "too late": 0}
    for number in range(NUM_INTERRUPTS):
        num_turns = len(talk.session.turns)
        timer = threading.Timer(chance.uniform(0.0, 0.9 * whole_s), os.kill, (os.getpid(), signal.SIGINT))
        begun = threading.Event()
        talk.session.engine.model.before_layer = lambda batch, layer, begun=begun: (
            begun.set() or time.sleep(SECONDS_PER_LAYER)
        )
        starter = threading.Thread(target=lambda begun=begun, timer=timer: begun.wait() and timer.start())
        starter.start()
        shown = talk.say(f"{number} {PROMPT}")
        starter.join()
        timer.cancel()
        timer.join()
        text = "".join(turn.text for turn in talk.session.turns[num_turns + 1 :])
        assert f"number {number} it is, and so on".startswith(text)
        assert talk.session.turns[num_turns].text == f"{number} {PROMPT}".strip()
        kind = "too late" if "stopped" not in shown else "stopped while answering" if text else "stopped while reading"
        endings[kind] += 1
        if number % 5 == 4:  # a correct next answer
            talk.say(f"next{number}")
            assert talk.session.turns[-1].text == f"number next{number} it is, and so on"
            talk.say("/clear")
    assert endings["stopped while reading"] > 3
    assert endings["stopped while answering"] > 3
    kv = talk.session.engine.scheduler.kv
    assert kv.num_available == kv.num_pages
    talk.chat.autosave.close()
