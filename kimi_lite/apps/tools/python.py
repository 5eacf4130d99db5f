"""A tool that runs Python in a process of its own: bounded time, memory, files, processes and output, and an empty
folder to work in.

What else confines a script is Linux's to give: namespaces (it sees no process, network, shared memory or file of the
outside), Landlock (it opens no file of the outside), seccomp (system calls past both are refused). `isolation` finds
out by trying what this system allows; where something is missing, `Isolation.risks` says what that means, the question
before every run repeats it, and its default is no. `python_child` is the process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kimi_lite.apps.tools.python_child import INNER_USER, NOT_ALLOWED_EXIT, readable_paths
from kimi_lite.apps.tools.tool import LONGEST_RESULT, ShouldStop, Tool, parameters, shortened

MIB = 1024**2
POLL_S = 0.005
CLEAN_UP_S = 10.0  # that the child gets for ending what the script started
_CHILD = Path(__file__).with_name("python_child.py")
_SIGNAL_SCOPE = 6  # Landlock's version that confines signals
_ENDINGS = {
    "time": "ended after {limits.time_s:g} s, the limit",
    "stopped": "stopped by the user",
    "memory": "ended: its processes together took more than {memory_mib} MiB, the limit",
    "processes": "ended: it started more than {limits.num_processes} processes, the limit",
    "disk": "ended: its files took more than {disk_mib} MiB, the limit",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one run; memory and processes of all that it starts together. The child looks every 0.03 s."""

    time_s: float = 30.0
    memory_bytes: int = 2048 * MIB
    file_bytes: int = 64 * MIB  # of output too, which goes through files
    disk_bytes: int = 256 * MIB  # of its folder
    num_processes: int = 64


@dataclass(frozen=True, slots=True)
class Isolation:
    """What this system lets a script give up."""

    has_namespaces: bool
    landlock_version: int  # 0: none
    has_seccomp: bool
    bwrap: str = ""  # bubblewrap's path, which gives namespaces where programs do not get them by themselves

    @property
    def is_separate(self) -> bool:
        return self.has_namespaces or bool(self.bwrap)

    @property
    def risks(self) -> tuple[str, ...]:
        """What a script can do here that it should not, for the user who allows calls."""
        if self.is_separate and self.has_seccomp:
            return ()
        if self.is_separate:
            return (
                "this system has no seccomp: its memory may exceed the limit, and kernel faults are easier to reach",
            )
        found = []
        if not self.has_seccomp:
            found.append("it has the network, and reaches programs of yours that listen on local sockets")
        if not self.landlock_version:
            found.append("it can read and write every file that you can")
        elif self.has_seccomp:
            found.append("it sees names, sizes and dates of your files (not what is in them)")
        else:
            found.append("it can change modes and dates of your files, and sees their names and sizes")
        if self.landlock_version < _SIGNAL_SCOPE:
            found.append("it can end your other programs, and the one that keeps its time")
        if not self.has_seccomp:
            found.append("it can leave shared memory behind")
        return tuple(found)


def isolation() -> Isolation:
    """Asked by trying, 0.1 s."""
    nothing = Isolation(False, 0, False)
    with tempfile.TemporaryDirectory(prefix="kimi-lite-python-") as folder:
        command = [sys.executable, "-I", str(_CHILD), "probe", folder]
        try:
            done = subprocess.run(
                command, cwd=folder, env=_environment(folder), capture_output=True, timeout=30, check=True
            )
            found = json.loads(done.stdout)
        except (OSError, ValueError, subprocess.SubprocessError):
            return nothing
        how = Isolation(bool(found["namespaces"]), found["landlock"], bool(found["seccomp"]))
        return how if how.has_namespaces else _with_bwrap(how, Path(folder))


def _with_bwrap(how: Isolation, folder: Path) -> Isolation:
    """With bubblewrap where it is installed and works: its packages are allowed what others are not."""
    wrapped = replace(how, bwrap=shutil.which("bwrap") or "")
    if not wrapped.bwrap or os.geteuid() == 0:  # root would own the devices in there
        return how
    script = folder / "script.py"
    script.write_text("")
    command = _command(script, Limits(), wrapped, report_fd=-1)
    try:
        done = subprocess.run(command, cwd=folder, env=_environment(str(folder)), capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return how
    return wrapped if done.returncode == 0 else how


def python_tool(how: Isolation, limits: Limits | None = None) -> Tool:
    """The tool `run_python`; its description says what there is."""
    limits = limits or Limits()
    description = (
        f"Run a Python {sys.version_info.major}.{sys.version_info.minor} script and return what it prints "
        f"(stdout, then stderr). "
        f"At most {limits.time_s:g} s and {limits.memory_bytes // MIB} MiB; an empty working folder that is "
        f"deleted afterwards; nothing is kept between runs."
    )
    if how.is_separate or how.has_seccomp:
        description += " No network."
    if how.is_separate or how.landlock_version:
        description += " No access to other files: put data into the script."
    schema = parameters(("code",), code={"type": "string", "description": "The script. Print what you want to see."})
    return Tool(
        "run_python",
        description,
        schema,
        lambda arguments, stop: run_python(arguments, stop, limits, how),
        risks=tuple(f"not confined here: {risk}" for risk in how.risks),
    )


def run_python(arguments: dict[str, Any], should_stop: ShouldStop, limits: Limits, how: Isolation) -> str:
    """What the script printed, and how it ended if not well."""
    with tempfile.TemporaryDirectory(prefix="kimi-lite-python-") as folder, tempfile.TemporaryFile() as out:
        script = Path(folder, "script.py")
        script.write_text(str(arguments["code"]), encoding="utf-8", errors="replace")
        with tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as report:
            process = subprocess.Popen(
                _command(script, limits, how, report.fileno()),
                cwd=folder,
                env=_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=(report.fileno(),),
                start_new_session=True,
            )
            is_stopped = _wait(process, should_stop, limits)
            report.seek(0)
            told = json.loads(report.read() or b"{}")
            if is_stopped and not told:
                told = {"ending": "stopped"}  # bubblewrap, told to end, does not ask the keeper
            return _report(_text(out), _text(err), process.returncode, told, limits, folder)


def _command(script: Path, limits: Limits, how: Isolation, report_fd: int) -> list[str]:
    numbers = (
        limits.memory_bytes,
        limits.time_s,
        limits.file_bytes,
        1 if how.has_namespaces else 2 if how.bwrap else 0,
        int(how.landlock_version > 0),
        int(how.has_seccomp),
        limits.disk_bytes,
        limits.num_processes,
        report_fd,
    )
    command = [sys.executable, "-I", str(_CHILD), str(script), *map(str, numbers)]
    return [*_in_bwrap(how.bwrap, script, limits), *command] if how.bwrap else command


def _in_bwrap(bwrap: str, script: Path, limits: Limits) -> list[str]:
    """What `python_child.enter_root` does, in bubblewrap's words."""
    user = str(INNER_USER)
    words = [bwrap, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--uid", user, "--gid", user]
    bound: list[str] = []
    for path in readable_paths():
        if any(path == one or path.startswith(f"{one}/") for one in bound):
            continue
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        else:
            words += ["--ro-bind", path, path]
            bound.append(path)
    size, folder = str(limits.disk_bytes), str(script.parent)
    words += ["--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    words += ["--size", size, "--tmpfs", "/tmp"]
    words += [*(() if folder.startswith("/tmp/") else ("--size", size, "--tmpfs", folder)), "--dir", folder]
    words += ["--ro-bind", str(script), str(script), "--ro-bind", str(_CHILD), str(_CHILD), "--remount-ro", "/"]
    return [*words, "--chdir", folder, "--"]


def _environment(folder: str) -> dict[str, str]:
    """Nothing of the user's: environments hold keys. Few threads: each takes address space, which is limited."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "4")
    places = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder}
    return {**places, "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8", **threads}


def _wait(process: subprocess.Popen, should_stop: ShouldStop, limits: Limits) -> bool:
    """Until the child has ended, which ends the script in time and all that it started; whether it was stopped."""
    end_s, is_told = time.monotonic() + limits.time_s + CLEAN_UP_S, False
    try:
        while process.poll() is None and time.monotonic() < end_s:
            if should_stop() and not is_told:
                process.terminate()
                is_told, end_s = True, time.monotonic() + CLEAN_UP_S
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            process.kill()  # init dies with it, and with init all
            process.wait()
    return is_told


def _text(file: Any) -> str:
    """Beginning and end of an output."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= 4 * LONGEST_RESULT:
        return file.read().decode("utf-8", "replace")
    head = file.read(2 * LONGEST_RESULT).decode("utf-8", "replace")
    file.seek(-2 * LONGEST_RESULT, os.SEEK_END)
    return f"{head}\n[... output too long ...]\n{file.read().decode('utf-8', 'replace')}"


def _report(out: str, err: str, code: int, told: dict[str, Any], limits: Limits, folder: str) -> str:
    parts = [
        part.rstrip("\n") for part in (shortened(out, LONGEST_RESULT * 2 // 3), _tidy(err, folder)) if part.strip()
    ]
    code, ending = told.get("code", NOT_ALLOWED_EXIT if code == NOT_ALLOWED_EXIT else code), told.get("ending", "")
    if ending:
        numbers = {"memory_mib": limits.memory_bytes // MIB, "disk_mib": limits.disk_bytes // MIB, "limits": limits}
        parts.append(f"[{_ENDINGS[ending].format(**numbers)}]")
    elif not told and code == NOT_ALLOWED_EXIT:
        parts.append("[the script could not be isolated and was not run]")
    elif code:
        parts.append(f"[signal {signal.Signals(-code).name}]" if code < 0 else f"[exit code {code}]")
    return "\n".join(parts) or "(no output)"


def _tidy(err: str, folder: str) -> str:
    """Without the name of a folder that says nothing."""
    return shortened(err.replace(folder + os.sep, ""), LONGEST_RESULT // 3)
