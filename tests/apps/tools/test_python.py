"""The Python runner: what a script says and how it ends, within limits and without a network."""

import os
import time
from pathlib import Path

import pytest

from kimi_lite.apps.tools.python import MIB, Isolation, Limits, isolation, python_tool, run_python
from kimi_lite.apps.tools.tool import LONGEST_RESULT

HERE, OPEN = isolation(), Isolation(False, False)
needs_namespaces = pytest.mark.skipif(not HERE.is_separate, reason="this system gives ordinary processes no namespaces")
needs_landlock = pytest.mark.skipif(not HERE.is_confined, reason="this system has no Landlock")


def run(code: str, should_stop=lambda: False, how: Isolation = HERE, **limits: float) -> str:
    return run_python({"code": code}, should_stop, Limits(**limits), how)


@pytest.mark.parametrize("how", dict.fromkeys([HERE, OPEN]))
def test_output_errors_and_exit_codes(how: Isolation) -> None:
    assert run("import sys\nprint('你好')\nprint('e', file=sys.stderr)", how=how) == "你好\ne"
    shown = run("def f():\n    return 1 / 0\nf()", how=how)
    assert shown.startswith('Traceback (most recent call last):\n  File "script.py", line 3, in <module>')
    assert shown.endswith("ZeroDivisionError: division by zero\n[exit code 1]")
    assert "python_child" not in shown
    assert run("import sys; sys.exit(3)", how=how) == "[exit code 3]"
    assert run("x = 1", how=how) == "(no output)"
    assert "[signal SIGSEGV]" in run("import ctypes; ctypes.string_at(0)", how=how)


def test_time_memory_and_output_have_limits() -> None:
    began_s = time.monotonic()
    assert run("print('begun', flush=True)\nwhile True: pass", time_s=0.4) == "begun\n[ended after 0.4 s, the limit]"
    assert time.monotonic() - began_s < 5.0
    assert "MemoryError" in run("x = bytearray(10**9)", memory_bytes=256 * MIB)
    shown = run("print('x' * 10**6)")
    assert len(shown) < LONGEST_RESULT
    assert "left out" in shown
    assert "File too large" in run("open('f', 'wb').write(bytes(10**7))", file_bytes=MIB)


def test_it_can_be_stopped() -> None:
    began_s = time.monotonic()
    assert (
        run("import time; time.sleep(60)", should_stop=lambda: time.monotonic() > began_s + 0.3)
        == "[stopped by the user]"
    )
    assert time.monotonic() - began_s < 5.0


@needs_namespaces
def test_no_network_and_nothing_lives_on() -> None:
    assert "unreachable" in run("import socket; socket.create_connection(('1.1.1.1', 53), 1)")
    mark = f"kimi-lite-test-{os.getpid()}"
    sleeper = f"if os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['{mark}', '60'])"
    assert run(f"import os, time\n{sleeper}\ntime.sleep(0.2)") == "(no output)"
    assert run("import os, time; os.setsid(); time.sleep(60)", time_s=0.4) == "[ended after 0.4 s, the limit]"
    time.sleep(0.1)
    commands = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                commands.append(file.read())
        except OSError:
            continue
    assert not [command for command in commands if mark in command or "kimi-lite-python" in command]


@needs_landlock
def test_other_files_are_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    for code in (f"print(open({str(tmp_path / 'secret')!r}).read())", f"open({str(tmp_path / 'new')!r}, 'w')"):
        assert "Permission denied" in run(code)
        assert "Permission denied" in run(
            f"import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', {code!r}]))"
        )
    assert not (tmp_path / "new").exists()
    code = "import os\nos.mkdir('d')\nopen('f', 'w').write('x')\nos.rename('f', 'd/f')\nos.truncate('d/f', 0)"
    assert run(code + "\nprint(os.listdir('d'))") == "['f']"
    assert (
        run("import numpy, sqlite3, multiprocessing\nprint(numpy.ones(3).sum())\nopen('/dev/null', 'w').write('x')")
        == "3.0"
    )


def test_the_users_environment_and_folder_are_not_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    shown = run("import os; print(dict(os.environ), os.listdir('.'), os.getcwd())")
    assert "sk-secret" not in shown
    assert "['script.py']" in shown
    assert os.getcwd() not in shown


def test_the_description_says_what_it_is() -> None:
    tool = python_tool(HERE, Limits(time_s=5.0))
    assert "At most 5 s" in tool.description
    assert ("No network" in tool.description) == HERE.is_separate
    assert tool.run({"code": "print(6 * 7)"}, lambda: False) == "42"
    assert len(HERE.warnings) == 2 - HERE.is_separate - HERE.is_confined
    assert len(OPEN.warnings) == 2
