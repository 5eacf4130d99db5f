"""The real program on the demo model, at a real terminal: every command is typed, and every screen compared.

`demo_conversation.txt` is what is typed and what the screen shall show: `#` stands for a number, `…` for anything on
its row, `⋮` for more rows, and `{answer}` for the last answer as the session's file has it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_lite.apps.chat.commands.registry import all_commands
from kimi_lite.demo.build import demo_model_path, ensure_demo_model
from kimi_lite.errors import KimiLiteError
from tests.apps.terminal import Terminal

NAME = "SmolLM2-135M-Instruct in the Kimi K2.5 architecture"
TRANSCRIPT = Path(__file__).with_name("demo_conversation.txt")
COMPILING_S = 200.0  # where the kernels are not in the cache yet
_WILD = {"#": r"[\d.,]+", "…": ".*", "⋮": r"[\s\S]*"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the demo model and the kernels in it, and nothing else; skipped where the demo cannot be had."""
    try:
        real = ensure_demo_model()
    except KimiLiteError as error:
        pytest.skip(f"no demo model here: {error.message}")
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in (real, real.parent / "kernels"):
        path.mkdir(exist_ok=True) if not path.exists() else None
        (cache / path.name).symlink_to(path)
    monkeypatch.setenv("KIMI_LITE_CACHE", str(cache))
    assert demo_model_path().is_file()
    return tmp_path


def conversation() -> Iterator[tuple[str, list[str]]]:
    """What is typed, and the rows that shall follow."""
    for step in TRANSCRIPT.read_text().removeprefix("❯ ").removesuffix("\n❯\n").split("\n❯ "):
        line, *rows = step.split("\n")
        yield line, rows


def shown_after(screen: list[str], line: str) -> list[str]:
    """The rows between the last prompt with this line and the empty prompt at the end."""
    (start, *_) = [i for i in range(len(screen) - 2, -1, -1) if screen[i] == f"❯ {line}"[:80].rstrip()]
    return screen[start + 1 : -1]


def is_as_expected(rows: list[str], expected: list[str], answer: str) -> bool:
    text = "\n".join(rows)
    patterns = ["".join(_WILD.get(char, re.escape(char)) for char in row) for row in expected]
    if expected[0] != "{answer}":
        return re.fullmatch("\n".join(patterns), text) is not None
    ending = "\n".join(patterns[1:])
    found = re.search(rf"\n{ending}\n*$", text)
    return found is not None and words(text[: found.start()]) == words(answer)


def words(markdown: str) -> str:
    """Letters and digits: what Markdown and the screen's width leave alone."""
    return "".join(char for char in markdown if char.isalnum())


def last_answer(folder: Path) -> str:
    path = max((folder / "state" / "sessions").glob("*.json"), key=lambda one: one.stat().st_mtime)
    turns = json.loads(path.read_text())["turns"]
    return turns[-1]["content"] if turns else ""


def test_every_command_on_the_demo_model(folder: Path) -> None:
    terminal = Terminal("kimi_lite", "chat", "--temp", "0", "-n", "16", "-t", "1", num_rows=60, num_columns=80)
    terminal.timeout_s = COMPILING_S
    start = terminal.wait_for_prompt()
    assert start[0].startswith(f"kimi-lite 0.1.0 · {NAME}")
    assert len(start) <= 10
    for word in ("-m FOLDER", "RAM", "context 8,192", "no thinking mode", "expected", "limit"):
        assert word in "\n".join(start)
    typed = {"help", "exit", "read"}
    for line, expected in conversation():
        line = line.replace("FOLDER", str(folder))
        rows = shown_after(terminal.enter(line), line)
        answer = last_answer(folder) if "{answer}" in expected else ""
        assert is_as_expected(rows, expected, answer), "\n".join([line, *rows, "--- expected", *expected, answer])
        typed |= {line.split()[0].removeprefix("/")} if line.startswith("/") else set()
    (folder / "note.txt").write_text("The answer is blue.\n")
    assert terminal.enter(f"/read {folder}/note.txt")[-1].startswith("1 file ❯")
    terminal.enter("/read off")
    help_screen = terminal.enter("/help")
    assert help_screen[-2].split() == ["Tab", "completes", "commands,", "paths", "and", "names"]
    terminal.type("/exit\r")
    assert terminal.wait() == 0
    terminal.close()
    assert typed - {"exti"} == {command.names[0] for command in all_commands().commands}


def test_a_long_conversation_goes_on_after_a_restart_with_nothing_read_twice(folder: Path) -> None:
    flags = ("chat", "--temp", "0", "-n", "8", "-t", "1", "--session", "long")
    terminal = Terminal("kimi_lite", *flags)
    terminal.timeout_s = COMPILING_S
    terminal.wait_for_prompt()
    terminal.enter("Remember these numbers: " + " ".join(map(str, range(100, 220))))
    terminal.type("\x04")
    assert terminal.wait() == 0
    terminal.close()
    again = Terminal("kimi_lite", *flags)
    again.wait_for_prompt()
    again.enter("And what is the capital of France?")
    numbers = re.search(r"prompt ([\d,]+) tok .*\(([\d,]+) cached\)", again.seen)
    assert numbers, again.seen
    num_prompt, num_cached = (int(number.replace(",", "")) for number in numbers.groups())
    assert num_prompt - num_cached < 64 + 40, (
        num_prompt,
        num_cached,
    )  # whole pages are saved: less than one, and the question
    again.close()
