"""Real coding agents against a scripted server: each writes a file in a scratch repository with its own tool.

    python -m kimi_lite.tools.serve.agents            # those that are installed; names: only these

An agent is started by `kimi-lite launch`, as a user would, with a home folder of its own, and has done its task when
the file is there and the agent says so. Nothing but this machine is asked for.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kimi_lite.tools.serve.scripted import FILE_NAME, FILE_TEXT, TASK

_TIMEOUT_S = 180
# What makes an agent do one task without asking.
AGENTS: Mapping[str, Sequence[str]] = {
    "opencode": ("run", TASK),
    "codex": ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", TASK),
    "claude": ("-p", "--dangerously-skip-permissions", TASK),
    "aider": (
        *("--yes-always", "--no-check-update", "--no-analytics", "--no-show-release-notes"),
        *("--message", TASK, FILE_NAME),
    ),
    "kimi": ("-p", TASK),
    "qwen": ("--yolo", "-p", TASK),
}
_QUIET = {  # no calls home
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "IS_SANDBOX": "1",
    "KIMI_DISABLE_TELEMETRY": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
}


@dataclass(frozen=True, slots=True)
class Deed:
    """What an agent did."""

    name: str
    version: str
    is_done: bool
    elapsed_s: float
    said: str  # all that it printed

    @property
    def row(self) -> str:
        return f"| {self.name} | {self.version} | {'done' if self.is_done else 'NOT done'} | {self.elapsed_s:.0f} s |"


@contextmanager
def scripted_server() -> Iterator[int]:
    """The port of a server that follows `scripted.write_a_file`."""
    command = [sys.executable, "-m", "kimi_lite.tools.serve.scripted", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stderr if " listens on " in line)
        yield int(line.rpartition(":")[2])
    finally:
        server.terminate()
        server.communicate(timeout=30)


def drive(name: str, port: int) -> Deed:
    """Let an installed agent do the task."""
    with tempfile.TemporaryDirectory(prefix="kimi-lite-agent-") as folder:
        home, repository = Path(folder, "home"), Path(folder, "repository")
        for each in (home, repository):
            each.mkdir()
        environment = os.environ | _QUIET | {"HOME": str(home), "KIMI_LITE_STATE": str(home / "kimi-lite")}
        _start_repository(repository, environment)
        command = [sys.executable, "-m", "kimi_lite", "launch", "--port", str(port), name, *AGENTS[name]]
        started_s = time.monotonic()
        try:
            run = subprocess.run(
                command,
                cwd=repository,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
            said, is_ended = run.stdout, run.returncode == 0
        except subprocess.TimeoutExpired as expired:
            said, is_ended = (expired.output or b"").decode("utf-8", "replace"), False
        written = repository / FILE_NAME
        is_done = is_ended and written.is_file() and written.read_text() == FILE_TEXT
        return Deed(name, _version(name, environment), is_done, time.monotonic() - started_s, said)


def _start_repository(folder: Path, environment: Mapping[str, str]) -> None:
    (folder / "README.md").write_text("A scratch repository.\n")
    author = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    for arguments in (("init", "-q"), ("add", "-A"), (*author, "commit", "-q", "-m", "begin")):
        subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True)


def _version(name: str, environment: Mapping[str, str]) -> str:
    shown = subprocess.run(
        [name, "--version"], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    return (shown.stdout.strip().splitlines() or ["?"])[-1]


def main(names: Sequence[str]) -> int:
    """A table of what was done; 1 where something was not."""
    chosen = names or [name for name in AGENTS if shutil.which(name)]
    with scripted_server() as port:
        deeds = [drive(name, port) for name in chosen]
    for deed in deeds:
        print(deed.row if deed.is_done else f"{deed.row}\n{deed.said}")
    return 0 if all(deed.is_done for deed in deeds) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
