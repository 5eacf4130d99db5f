"""`kimi-lite run`: where the prompt comes from, what goes to which stream, and how it ends."""

import json
import os
import resource
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kimi_lite import __version__
from kimi_lite.apps import opening
from kimi_lite.apps.piped import FIRST_BYTE_S
from kimi_lite.cli import app
from kimi_lite.engine.engine import Engine
from kimi_lite.errors import KimiLiteError
from tests.apps.fake_main import open_fake
from tests.apps.fake_openai import Answer, FakeOpenAI, sse
from tests.apps.terminal import Terminal

ROOT = Path(__file__).parents[2]
FAKE = [sys.executable, "-m", "tests.apps.fake_main"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Engines are fake; the list holds those that were opened."""
    engines: list[Engine] = []
    monkeypatch.setattr(opening, "load", lambda *arguments: engines.append(open_fake(*arguments)) or engines[-1])
    return engines


def invoke(*arguments: str, stdin: str = "", env: dict | None = None) -> Result:
    return CliRunner().invoke(app, ["run", "-m", "x.gguf", *arguments], input=stdin, env=env, catch_exceptions=True)


def test_stdout_has_the_answer_and_nothing_else(opened: list[Engine]) -> None:
    result = invoke("hi there")
    assert (result.exit_code, result.stdout) == (0, "you said: hi there\n")
    assert "prompt" in result.stderr
    assert "t/s" in result.stderr
    assert "about it" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (["-p", "hello"], "", "hello"),
        ([], "from a pipe", "from a pipe"),
        (["-f", "-"], "dash", "dash"),
        (["look:", "-f", "FILE"], "", "look:\n\nin a file"),
        (["-f", "FILE"], "", "in a file"),
        (["-f", "FILE"], "piped", "in a file\n\npiped"),
        (["look:"], "piped", "look:\n\npiped"),
        (["-p", "look:"], "piped", "look:\n\npiped"),
        (["look:", "-f", "-"], "piped", "look:\n\npiped"),
        (["look:", "-f", "FILE"], "piped\r\ntwice\r\n", "look:\n\nin a file\n\npiped\ntwice"),
        (["look:"], " \n", "look:"),
    ],
)
def test_the_prompt_comes_from_where_it_is(
    opened: list[Engine], tmp_path: Path, arguments: list[str], stdin: str, expected: str
) -> None:
    (tmp_path / "prompt.txt").write_text("in a file")
    result = invoke(*[str(tmp_path / "prompt.txt") if a == "FILE" else a for a in arguments], stdin=stdin)
    assert result.stdout == f"you said: {expected}\n"


def test_the_readme_pipes_a_diff_into_a_prompt() -> None:
    """Its own line, with the scripted model as `kimi-lite` and any text as `git diff`."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("git diff |"))
    fake = shlex.join(FAKE)
    line = line.replace("git diff", "printf '+ one line'").replace("kimi-lite run", f"{fake} run -m x")
    done = subprocess.run(line, cwd=ROOT, shell=True, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["text"] == "you said: Write a commit message for this.\n\n+ one line"


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        *((kind, ["hi"]) for kind in ("never closed", "a socket", "closed", "null", "write-only", "a terminal")),
        *(("never closed", prompt) for prompt in (["-p", "hi"], ["-f", "FILE"])),
    ],
)
def test_a_stdin_that_has_nothing_hangs_and_spoils_nothing(prompt: list[str], kind: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hi")
    arguments = [str(tmp_path / "p.txt") if word == "FILE" else word for word in prompt]
    command = [*FAKE, "run", "-m", "x", *arguments]
    opened = {
        "never closed": lambda: os.pipe(),
        "a socket": lambda: [one.detach() for one in socket.socketpair()],
        "closed": lambda: [],
        "null": lambda: [os.open(os.devnull, os.O_RDONLY)],
        "write-only": lambda: [os.open(tmp_path / "w", os.O_WRONLY | os.O_CREAT)],
        "a terminal": lambda: list(reversed(os.openpty())),
    }[kind]()
    if not opened:
        command = ["sh", "-c", f"exec {shlex.join(command)} <&-"]
    done = subprocess.run(
        command, cwd=ROOT, stdin=opened[0] if opened else None, capture_output=True, text=True, timeout=120
    )
    for descriptor in opened:
        os.close(descriptor)
    assert (done.returncode, done.stdout) == (0, "you said: hi\n"), done.stderr
    assert ("nothing came through stdin" in done.stderr) == (kind in ("never closed", "a socket"))


def test_a_slow_neighbour_in_the_pipeline_is_waited_for(tmp_path: Path) -> None:
    """For longer than a pipe without one, counted from when it is said what is waited for."""
    said = tmp_path / "said"
    said.touch()
    neighbour = f"until grep -q 'reading stdin' {said}; do sleep 0.1; done; sleep {FIRST_BYTE_S}; echo late"
    line = f"({neighbour}) | {shlex.join(FAKE)} run -m x look: 2>{said}"
    done = subprocess.run(line, cwd=ROOT, shell=True, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "you said: look:\n\nlate\n"


def test_quiet_means_quiet(opened: list[Engine]) -> None:
    result = invoke("hi", "-q")
    assert (result.stdout, result.stderr) == ("you said: hi\n", "")


def test_json_is_one_document(opened: list[Engine]) -> None:
    result = invoke("hi", "--json")
    document = json.loads(result.stdout)
    assert (document["text"], document["reasoning"], document["finish_reason"]) == ("you said: hi", "about it", "stop")
    assert document["model"] == "fake"
    tokenizer = opened[0].tokenizer
    assert tokenizer.decode(document["ids"]) == "about it</think>you said: hi<|im_end|>"
    assert document["stats"]["generated_tokens"] == len(document["ids"])
    assert document["stats"]["prompt_tokens"] > 0


def test_output_goes_to_a_file_whole(opened: list[Engine], tmp_path: Path) -> None:
    path = tmp_path / "answer.txt"
    result = invoke("hi", "-o", str(path))
    assert (result.stdout, path.read_text()) == ("", "you said: hi\n")
    assert list(tmp_path.iterdir()) == [path]


def test_flags_reach_the_engine_and_the_sampler(opened: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, request: seen.append(request) or add(self, request))
    flags = "-c 2K -t 3 -n 7 --top-k 5 --top-p 0.5 --min-p 0.1 --repeat-penalty 1.1 --seed 4 -s short --no-think"
    invoke("hi", *flags.split(" "), "--no-prefix-cache")
    sampling = seen[0].sampling
    assert opened[0].opened_with[0] == Path("x.gguf")
    options = opened[0].opened_with[1]
    assert (options.context_length, options.num_threads, options.prefix_folder) == (2048, 3, None)
    assert (sampling.temperature, sampling.max_tokens, sampling.top_k, sampling.top_p) == (0.6, 7, 5, 0.5)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.1, 1.1, 4)
    assert "short" in opened[0].tokenizer.decode(seen[0].prompt_ids)
    assert not seen[0].starts_in_reasoning
    invoke("hi", "--temp", "0.3")
    assert seen[1].sampling.temperature == 0.3


def test_settings_come_from_the_environment_too(opened: list[Engine]) -> None:
    result = invoke("hi", "--json", env={"KIMI_LITE_CTX": "1K", "KIMI_LITE_MAX_TOKENS": "3", "KIMI_LITE_THINK": "0"})
    document = json.loads(result.stdout)
    assert (opened[0].context_length, document["finish_reason"], document["reasoning"]) == (1024, "length", "")
    assert len(document["ids"]) == 3


def test_without_a_model_the_demo_is_used_and_said_so(opened: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_lite.demo.build.ensure_demo_model", lambda on_progress: Path("demo.gguf"))
    result = CliRunner().invoke(app, ["run", "hi"], env={"KIMI_LITE_MODEL": None})
    assert result.stdout == "you said: hi\n"
    assert "no -m given: this is the demo" in result.stderr
    assert "-m FOLDER" in result.stderr
    assert opened[0].opened_with[0] == Path("demo.gguf")
    CliRunner().invoke(app, ["run", "hi"], env={"KIMI_LITE_MODEL": "mine.gguf"})
    assert opened[1].opened_with[0] == Path("mine.gguf")


def spawn(*arguments: str, **options: object) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*FAKE, *arguments], cwd=ROOT, text=True, **{**pipes, **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-m", "x", "one", "-p", "two"], "given twice"),
        (["run", "-m", "x"], "empty"),
        (["run", "-m", "x", "-f", "no/such/file"], "no/such/file"),
        (["run", "-m", "x", "--temp", "-3", "hi"], "--temp is '-3'"),
        (["run", "-m", "x", "-c", "64", "z" * 80], "it has 64"),
        (["run", "-m", "x", "-c", "much", "hi"], "much"),
        (["run", "-m", "x", "hi", "-o", "/no/such/folder/file"], "cannot be written"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(arguments: list[str], message: str) -> None:
    process = spawn(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert message in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("name", ["no/such", ".", "x" * 300, "file/below"])
def test_what_cannot_be_written_is_said_before_the_model_is_loaded(
    opened: list[Engine], tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / name
    result = invoke("hi", "-o", str(path))
    assert isinstance(result.exception, KimiLiteError)
    assert "The answer cannot be written to" in str(result.exception)
    assert "Errno" not in str(result.exception)
    assert opened == []


def test_an_answer_that_cannot_be_written_in_the_end_is_written_elsewhere(
    opened: list[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("kimi_lite.apps.run.require_writable", lambda path, what: None)  # it goes away in between
    result = invoke("hi", "-o", str(tmp_path / "no" / "such"))
    assert "cannot be written" in str(result.exception)
    (kept,) = (tmp_path / "tmp").iterdir()
    assert str(kept) in str(result.exception)
    assert kept.read_text() == "you said: hi\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("flags", [[], ["--json"], ["-o", "/dev/full"]])
def test_a_full_disk_behind_stdout_loses_no_answer(flags: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        env = os.environ | {"TMPDIR": str(tmp_path)}
        process = spawn("run", "-m", "x", "all of it", *flags, stdout=full, env=env)
        err = process.communicate(timeout=120)[1]
    assert "cannot be written to" in err
    assert "No space left on device." in err
    assert "Traceback" not in err
    (kept,) = tmp_path.glob("kimi-lite-*")
    assert "you said: all of it" in kept.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stderr_costs_only_the_remarks() -> None:
    with open("/dev/full", "w") as full:
        for command, stdin in ((["run", "-m", "x", "hi"], ""), (["chat", "-m", "x"], "hi\n")):
            process = spawn(*command, stdin=subprocess.PIPE, stderr=full)
            assert process.communicate(stdin, timeout=120)[0] == "you said: hi\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_chat_whose_answers_cannot_be_shown_goes_on() -> None:
    with open("/dev/full", "w") as full:
        process = spawn("chat", "-m", "x", stdin=subprocess.PIPE, stdout=full)
        err = process.communicate("hi\nmore\n", timeout=120)[1]
    assert err.count("The answer cannot be shown: No space left on device.") == 2
    assert "Traceback" not in err


def test_an_endpoint_that_breaks_off_loses_nothing_of_an_answer_for_a_file(tmp_path: Path) -> None:
    answer = Answer([sse({"content": "half of it"}, reason=None, is_done=False)], is_cut=True)
    with FakeOpenAI(answer) as server:
        command = [sys.executable, "-m", "kimi_lite", "run", "--endpoint", server.url, "hi", "-o", str(tmp_path / "o")]
        env = os.environ | {"TMPDIR": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 2
    (kept,) = tmp_path.glob("kimi-lite-*")
    assert str(kept) in done.stderr
    assert kept.read_text() == "half of it"


def test_a_device_is_written_and_not_replaced(opened: list[Engine], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    invoke("hi", "-o", str(tmp_path / "pipe"))
    assert os.read(reader, 100) == b"you said: hi\n"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("source", ["argument", "pipe", "file"])
def test_bytes_that_are_no_text_are_refused(source: str, tmp_path: Path) -> None:
    latin1 = "caf\u00e9".encode("latin-1")
    (tmp_path / "prompt").write_bytes(latin1)
    arguments = {"argument": [latin1], "pipe": [], "file": ["-f", str(tmp_path / "prompt")]}[source]
    done = subprocess.run(
        [*FAKE, "run", "-m", "x", *arguments], cwd=ROOT, input=latin1, capture_output=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert b"not UTF-8 text: byte 0xE9 after 3 characters" in done.stderr


def test_on_a_terminal_reasoning_is_dim_and_the_answer_cannot_change_the_terminal() -> None:
    terminal = Terminal("tests.apps.fake_main", "run", "-m", "x", "hi \x1b[31mred")
    assert terminal.wait() == 0
    terminal.close()
    assert "\x1b[2ma" in terminal.raw
    assert "thought for" in terminal.seen
    assert "you said: hi \ufffd[31mred" in terminal.seen
    assert "\x1b[31m" not in terminal.raw


def test_a_stdout_of_another_encoding_shows_what_it_can() -> None:
    process = spawn("run", "-m", "x", "你 hi", "-q", env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert process.communicate(timeout=120) == ("you said: ? hi\n", "")
    assert process.returncode == 0


def test_a_reader_that_leaves_is_no_drama() -> None:
    process = spawn("run", "-m", "x", "slow", "-q")
    assert process.stdout.read(4) == "tick"
    process.stdout.close()
    assert process.wait(timeout=120) != 0
    assert process.stderr.read() == ""


@pytest.mark.parametrize("is_json", [False, True])
def test_ctrl_c_keeps_the_partial_answer(is_json: bool, tmp_path: Path) -> None:
    path = tmp_path / "answer"
    sign = tmp_path / "begun"
    arguments = ["--json", "-o", str(path)] if is_json else []
    process = spawn("run", "-m", "x", "slow", *arguments, env=os.environ | {"FAKE_TALKING": str(sign)})
    begun = ""
    if is_json:
        while not sign.exists():
            time.sleep(0.05)
    else:
        begun = process.stdout.read(9)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped" in err
    assert "Traceback" not in err
    if is_json:
        document = json.loads(path.read_text())
        assert document["finish_reason"] == "cancelled"
        assert document["text"].startswith("tick")
    else:
        assert ("tick " * 400).startswith((begun + out).removesuffix("\n"))
        assert out.endswith("\n")


def cpu_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_is_quick_and_heavy_libraries_stay_out() -> None:
    """`--help` under 0.3 s, of the processor's time so that other programs do not count; three times that for slow
    machines."""
    times_s = []
    for _ in range(3):
        begun_s = cpu_of_children_s()
        subprocess.run([sys.executable, "-m", "kimi_lite", "--help"], cwd=ROOT, check=True, capture_output=True)
        times_s.append(cpu_of_children_s() - begun_s)
    assert min(times_s) < 0.9, times_s
    code = "import sys, kimi_lite.cli; print([m for m in ('torch', 'numba', 'numpy', 'tiktoken') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"kimi-lite {__version__}\n"
