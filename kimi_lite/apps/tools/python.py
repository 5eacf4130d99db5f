"""A tool that runs Python in a process of its own: bounded time, memory, files and output, and an empty folder to work
in.

On Linux it has no network and sees no files but Python's, where the system allows programs to give both up (user
namespaces, Landlock). `isolation` finds that out by trying, and `warnings` say what is missing. `python_child` is the
process.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_lite.apps.tools.python_child import NOT_ALLOWED_EXIT
from kimi_lite.apps.tools.tool import LONGEST_RESULT, ShouldStop, Tool, parameters, shortened

MIB = 1024**2
POLL_S = 0.02
_CHILD = Path(__file__).with_name("python_child.py")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one run."""

    time_s: float = 30.0
    memory_bytes: int = 2048 * MIB
    file_bytes: int = 64 * MIB  # of output too, which goes through files


@dataclass(frozen=True, slots=True)
class Isolation:
    """What a script cannot do on this system."""

    is_separate: bool  # no network, and nothing it starts lives on
    is_confined: bool  # it reads Python's files, and writes in its own folder only

    @property
    def warnings(self) -> list[str]:
        """For the user, who allows calls."""
        missing = []
        if not self.is_separate:
            missing.append("run_python: this system does not let scripts give up the network; they have it.")
        if not self.is_confined:
            missing.append(
                "run_python: this system does not let scripts give up files; they can read and write what you can."
            )
        return missing


def isolation() -> Isolation:
    """Asked by trying, 0.1 s each."""
    return Isolation(_can_run(Isolation(True, False)), _can_run(Isolation(False, True)))


def python_tool(how: Isolation, limits: Limits | None = None) -> Tool:
    """The tool `run_python`; its description says what there is."""
    limits = limits or Limits()
    description = (
        f"Run a Python {sys.version_info.major}.{sys.version_info.minor} script and return what it prints "
        f"(stdout, then stderr). "
        f"At most {limits.time_s:g} s and {limits.memory_bytes // MIB} MiB; an empty working folder that is "
        f"deleted afterwards; "
        f"nothing is kept between runs.{' No network.' if how.is_separate else ''}"
        f"{' No access to other files: put data into the script.' if how.is_confined else ''}"
    )
    schema = parameters(("code",), code={"type": "string", "description": "The script. Print what you want to see."})
    return Tool("run_python", description, schema, lambda arguments, stop: run_python(arguments, stop, limits, how))


def _can_run(how: Isolation) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "nothing.py")
        script.write_text("")
        done = subprocess.run(_command(script, Limits(), how), cwd=folder, capture_output=True, timeout=30, check=False)
    return done.returncode == 0


def run_python(arguments: dict[str, Any], should_stop: ShouldStop, limits: Limits, how: Isolation) -> str:
    """What the script printed, and how it ended if not well."""
    with tempfile.TemporaryDirectory(prefix="kimi-lite-python-") as folder, tempfile.TemporaryFile() as out:
        script = Path(folder, "script.py")
        script.write_text(str(arguments["code"]), encoding="utf-8", errors="replace")
        with tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                _command(script, limits, how),
                cwd=folder,
                env=_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            ending = _wait(process, should_stop, limits)
            return _report(_text(out), _text(err), process.returncode, ending, folder)


def _command(script: Path, limits: Limits, how: Isolation) -> list[str]:
    numbers = (
        limits.memory_bytes,
        max(int(limits.time_s) + 1, 1),
        limits.file_bytes,
        int(how.is_separate),
        int(how.is_confined),
    )
    return [sys.executable, "-I", str(_CHILD), str(script), *map(str, numbers)]


def _environment(folder: str) -> dict[str, str]:
    """Nothing of the user's: environments hold keys."""
    return {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}


def _wait(process: subprocess.Popen, should_stop: ShouldStop, limits: Limits) -> str:
    """Until it ends, or end it and all it started; says why."""
    end_s, ending = time.monotonic() + limits.time_s, ""
    try:
        while process.poll() is None:
            if should_stop():
                ending = "stopped by the user"
            elif time.monotonic() > end_s:
                ending = f"ended after {limits.time_s:g} s, the limit"
            if ending:
                break
            time.sleep(POLL_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own: what it left running ends too
        process.wait()
    return ending


def _text(file: Any) -> str:
    """Beginning and end of an output."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= 4 * LONGEST_RESULT:
        return file.read().decode("utf-8", "replace")
    head = file.read(2 * LONGEST_RESULT).decode("utf-8", "replace")
    file.seek(-2 * LONGEST_RESULT, os.SEEK_END)
    return f"{head}\n[... output too long ...]\n{file.read().decode('utf-8', 'replace')}"


def _report(out: str, err: str, code: int, ending: str, folder: str) -> str:
    parts = [
        part.rstrip("\n") for part in (shortened(out, LONGEST_RESULT * 2 // 3), _tidy(err, folder)) if part.strip()
    ]
    if ending:
        parts.append(f"[{ending}]")
    elif code == NOT_ALLOWED_EXIT:
        parts.append("[the script could not be isolated and was not run]")
    elif code:
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        parts.append(f"[{reason}]")
    return "\n".join(parts) or "(no output)"


def _tidy(err: str, folder: str) -> str:
    """A traceback without our own frames."""
    lines = err.replace(folder + os.sep, "").split("\n")
    ours = [i for i, line in enumerate(lines) if "python_child.py" in line or "<frozen runpy>" in line]
    hidden = {i for start in ours for i in range(start, start + 1 + _num_source_lines(lines, start))}
    return shortened("\n".join(line for i, line in enumerate(lines) if i not in hidden), LONGEST_RESULT // 3)


def _num_source_lines(lines: list[str], start: int) -> int:
    """Source and marker lines under a frame's own line."""
    count = 0
    while start + count + 1 < len(lines) and lines[start + count + 1].startswith("    "):
        count += 1
    return count
