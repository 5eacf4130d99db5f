"""The Python runner: what a script says and how it ends, its limits, and that it reaches nothing outside."""

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from kimi_lite.apps.tools import python_child
from kimi_lite.apps.tools.python import MIB, Isolation, Limits, isolation, python_tool, run_python
from kimi_lite.apps.tools.tool import LONGEST_RESULT

HERE, OPEN = isolation(), Isolation(False, 0, False)
WITHOUT_NAMESPACES = Isolation(False, HERE.landlock_version, HERE.has_seccomp)
needs_namespaces = pytest.mark.skipif(not HERE.has_namespaces, reason="this system gives programs no namespaces")
needs_landlock = pytest.mark.skipif(not HERE.landlock_version, reason="this system has no Landlock")
needs_seccomp = pytest.mark.skipif(not HERE.has_seccomp, reason="this system has no seccomp")
CHILD = python_child.__file__
BWRAP = shutil.which("bwrap") or ""
needs_bwrap = pytest.mark.skipif(not BWRAP or os.getuid() == 0, reason="bubblewrap is not installed, or not for root")
CONFINED = [
    pytest.param(HERE, id="all", marks=needs_namespaces),
    pytest.param(WITHOUT_NAMESPACES, id="without namespaces", marks=[needs_landlock, needs_seccomp]),
    pytest.param(replace(WITHOUT_NAMESPACES, bwrap=BWRAP), id="bubblewrap", marks=[needs_bwrap, needs_seccomp]),
]


def run(code: str, should_stop=lambda: False, how: Isolation = HERE, **limits: float) -> str:
    return run_python({"code": code}, should_stop, Limits(**limits), how)


def is_gone(mark: str) -> bool:
    """Whether no process has `mark` in its command, waiting a moment for those that are being ended."""
    end_s = time.monotonic() + 40.0
    while time.monotonic() < end_s:
        commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        if not any(mark in command for command in commands):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", dict.fromkeys([HERE, WITHOUT_NAMESPACES, OPEN]))
def test_output_errors_and_exit_codes(how: Isolation) -> None:
    assert run("import sys\nprint('你好')\nprint('e', file=sys.stderr)", how=how) == "你好\ne"
    shown = run("def f():\n    return 1 / 0\nf()", how=how)
    assert shown.startswith('Traceback (most recent call last):\n  File "script.py", line 3, in <module>')
    assert shown.endswith("ZeroDivisionError: division by zero\n[exit code 1]")
    assert "python_child" not in shown
    assert run("import sys; sys.exit(3)", how=how) == "[exit code 3]"
    assert run("import sys; sys.exit(97)", how=how) == "[exit code 97]"
    assert run("x = 1", how=how) == "(no output)"
    assert run("import atexit; atexit.register(print, 'bye')", how=how) == "bye"
    assert "[signal SIGSEGV]" in run("import ctypes; ctypes.string_at(0)", how=how)


def test_packages_and_processes_work() -> None:
    code = (
        "import numpy, sqlite3, asyncio, subprocess, sys, tempfile, shutil, os\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "print((numpy.ones((200, 200)) @ numpy.ones((200, 200))).sum())\n"
        "print(asyncio.run(asyncio.sleep(0, 'slept')), list(ThreadPoolExecutor(2).map(abs, [-1])))\n"
        "print(subprocess.run([sys.executable, '-c', 'print(6 * 7)'], capture_output=True, text=True).stdout)\n"
        "with tempfile.NamedTemporaryFile('w') as file: shutil.copy2(file.name, 'copy'); os.chmod('copy', 0o600)\n"
        "open('module_of_its_own.py', 'w').write('x = 5'); import module_of_its_own; print(module_of_its_own.x)\n"
        "open('/dev/null', 'w').write('x')\n"
    )
    assert run(code) == "8000000.0\nslept [1]\n42\n\n5"


@needs_namespaces
@pytest.mark.parametrize("links", [1, 3])
def test_pythons_behind_links_and_in_folders_behind_links(tmp_path: Path, links: int) -> None:
    """A virtual environment whose program is a chain of links, in a folder that is reached over a link."""
    target = os.path.realpath(sys.executable)
    (tmp_path / "real").mkdir()
    (tmp_path / "over").symlink_to("real")
    for i in range(links):
        (tmp_path / f"bin{i}").mkdir()
        (tmp_path / f"bin{i}/python").symlink_to(target)
        target = str(tmp_path / f"bin{i}/python")
    environment = tmp_path / "over/environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=120)
    (environment / "bin/python").unlink()
    (environment / "bin/python").symlink_to(target)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/script.py").write_text("import sys; print(sys.prefix)")
    numbers = (str(1 << 31), "20", "9999999", "1", "1")
    command = [environment / "bin/python", "-I", CHILD, tmp_path / "work/script.py", *numbers]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == f"{environment}\n", done.stderr


@needs_namespaces
def test_processes_share_work_and_memory_among_themselves() -> None:
    code = (
        "import multiprocessing as m\nfrom multiprocessing.shared_memory import SharedMemory\n"
        "if __name__ == '__main__':\n    with m.Pool(2) as pool: print(pool.map(abs, [-1, -2]))\n"
        "    s = SharedMemory(create=True, size=99); print(s.size >= 99); s.unlink()"
    )
    assert run(code) == "[1, 2]\nTrue"


def test_time_memory_and_output_have_limits() -> None:
    began_s = time.monotonic()
    assert run("print('begun', flush=True)\nwhile True: pass", time_s=1.5) == "begun\n[ended after 1.5 s, the limit]"
    assert time.monotonic() - began_s < 30.0
    assert "MemoryError" in run("x = bytearray(10**9)", memory_bytes=256 * MIB)
    shown = run("print('x' * 10**6)")
    assert len(shown) < LONGEST_RESULT
    assert "left out" in shown
    assert "File too large" in run("open('f', 'wb').write(bytes(10**7))", file_bytes=MIB)


@pytest.mark.parametrize("how", dict.fromkeys([HERE, WITHOUT_NAMESPACES, OPEN]))
def test_limits_count_all_its_processes_together(how: Isolation) -> None:
    children = (
        "import os, time\nfor _ in range({num}):\n    if os.fork() == 0:\n        b = bytearray({size} << 20)\n"
        "        b[::4096] = b'x' * len(b[::4096])\n        time.sleep(90)\n        os._exit(0)\ntime.sleep(90)"
    )
    shown = run(children.format(num=4, size=100), how=how, memory_bytes=250 * MIB, time_s=60.0)
    assert shown == "[ended: its processes together took more than 250 MiB, the limit]"
    shown = run(children.format(num=40, size=0), how=how, num_processes=20, time_s=60.0)
    assert shown == "[ended: it started more than 20 processes, the limit]"
    files = "import time\nfor i in range(8): open(f'f{i}', 'wb').write(bytes(1 << 20))\ntime.sleep(90)"
    shown = run(files, how=how, disk_bytes=4 * MIB, time_s=60.0)
    assert ("No space left" in shown) if how.has_namespaces else ("files took more than 4 MiB" in shown)
    unlinked = files.replace("write(bytes(1 << 20))", "write(bytes(1 << 20)), os.unlink(f'f{i}')").replace(
        "time", "os, time", 1
    )
    unlinked = unlinked.replace("open(", "kept.append(open(").replace(", 'wb').write", ", 'wb')), kept[-1].write")
    shown = run(f"kept = []\n{unlinked}", how=how, disk_bytes=4 * MIB, time_s=60.0)
    assert ("No space left" in shown) if how.has_namespaces else ("files took more than 4 MiB" in shown)
    shared = "import os, time\nb = bytearray(100 << 20)\nb[::4096] = b'x' * len(b[::4096])\n"
    shared += "children = [os.fork() or time.sleep(0.5) or os._exit(0) for _ in range(4)]\nprint('shared')"
    assert run(shared + "\ntime.sleep(0.3)", how=how, memory_bytes=300 * MIB) == "shared"


def test_it_can_be_stopped() -> None:
    began_s = time.monotonic()
    stopped = run("import time; time.sleep(60)", should_stop=lambda: time.monotonic() > began_s + 0.3)
    assert stopped == "[stopped by the user]"
    assert time.monotonic() - began_s < 30.0


LEAVERS = {
    "child": "os.fork() or time.sleep(60)",
    "session": "os.fork() or (os.setsid(), time.sleep(60))",
    "no death signal": "os.fork() or (ctypes.CDLL(None).prctl(1, 0, 0, 0, 0), os.setsid(), time.sleep(60))",
    "double fork": "os.fork() or (os.setsid(), os.fork() or (signal.signal(15, signal.SIG_IGN), time.sleep(60)))",
    "another program": "subprocess.Popen(['sleep', MARK], start_new_session=True)",
    "stopped": "os.fork() or os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("how", dict.fromkeys([HERE, WITHOUT_NAMESPACES, OPEN]))
@pytest.mark.parametrize("ending", ["ends", "is ended"])
@pytest.mark.parametrize("leaver", LEAVERS)
def test_nothing_lives_on(
    how: Isolation, leaver: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it keeps what it once found
    mark = f"{60 + time.monotonic() % 1:.9f}{os.getpid()}"
    code = (
        f"import ctypes, os, signal, subprocess, time\nMARK = {mark!r}\nprint('begun', flush=True)\n{LEAVERS[leaver]}\n"
    )
    code += "time.sleep(0.1 if {} else 60)".format(ending == "ends")
    shown = run(code, how=how, time_s=60.0 if ending == "ends" else 1.5)
    assert shown.startswith("begun")
    assert ("the limit" in shown) == (ending == "is ended")
    assert is_gone(f"{os.environ['TMPDIR']}/")
    assert is_gone(mark)


def test_it_ends_with_the_program(tmp_path: Path) -> None:
    code = "import time; open('/dev/null'); time.sleep(60)"
    outer = (
        "from kimi_lite.apps.tools.python import *\n"
        f"run_python({{'code': {code!r}}}, lambda: False, Limits(), isolation())"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], env=os.environ | {"TMPDIR": str(tmp_path)})
    end_s = time.monotonic() + 120.0
    while not any(f"{tmp_path}/" in part for p in psutil.process_iter(["cmdline"]) for part in p.info["cmdline"] or ()):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert is_gone(f"{tmp_path}/")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Files of a user and a program that listens on a socket."""
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "home/key").write_text("s3cret")
    (tmp_path / "home/key").chmod(0o600)
    paths = [f"/tmp/kimi-lite-test-{os.getpid()}-{name}" for name in ("socket", "datagrams")]
    kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_STREAM)
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_UNIX, kind)) for kind in kinds]
        for one, path in zip(sockets, [*paths, f"\0kimi-lite-test-{os.getpid()}"], strict=True):
            if path.startswith("/"):
                stack.callback(os.unlink, path)
                (tmp_path / "home" / path.rpartition("-")[2]).symlink_to(path)
            one.bind(path)
            one.setblocking(False)
        sockets[0].listen()
        sockets[2].listen()
        yield tmp_path / "home"
        with pytest.raises(BlockingIOError):  # nothing came
            sockets[0].accept()
        with pytest.raises(BlockingIOError):
            sockets[1].recv(9)
        with pytest.raises(BlockingIOError):
            sockets[2].accept()


def state(folder: Path) -> object:
    return [
        (path.name, oct(found.st_mode), found.st_mtime_ns, found.st_size, os.listxattr(path, follow_symlinks=False))
        for path in (folder, *sorted(folder.iterdir()))
        for found in [path.lstat()]
    ]


ATTACKS = {
    "read": "open(KEY).read()",
    "read through a link": "os.symlink(KEY, 'l'); open('l').read()",
    "read through a hard link": "os.link(KEY, 'l'); open('l').read()",
    "read through /proc": "open('/proc/self/root' + KEY).read()",
    "read of the caller": "open(f'/proc/{OUTER}/environ').read()",
    "list": "os.listdir(HOME)",
    "write": "open(KEY, 'w')",
    "append": "open(KEY, 'a')",
    "create": "open(HOME + '/new', 'w')",
    "truncate": "os.truncate(KEY, 0)",
    "remove": "os.remove(KEY)",
    "rename": "os.rename(KEY, HOME + '/gone')",
    "move in": "os.rename(KEY, 'mine')",
    "folder": "os.mkdir(HOME + '/d')",
    "mode": "os.chmod(KEY, 0o666)",
    "mode of the folder": "os.chmod(HOME, 0o777)",
    "mode by descriptor": "os.fchmod(os.open(KEY, os.O_PATH), 0o666)",
    "mode of what stdin is": "os.fchmod(0, 0o600)",
    "mode of a device": "os.chmod('/dev/null', 0o600)",
    "mode of Python": "os.chmod(os.path.realpath(sys.executable), 0o700)",
    "owner": "os.chown(KEY, -1, -1)",
    "dates": "os.utime(KEY, (1, 1))",
    "attribute": "os.setxattr(KEY, 'user.evil', b'1')",
    "new fchmodat2": "call(452, -100, KEY.encode(), 0o666, 0)",
    "local socket": "s = socket.socket(socket.AF_UNIX); s.connect(SOCKET); s.send(b'x')",
    "local socket, datagram": "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', SOCKET)",
    "local socket, from a pair": "a, b = socket.socketpair(type=socket.SOCK_DGRAM); a.sendto(b'x', DATAGRAMS)",
    "abstract socket": "socket.socket(socket.AF_UNIX).connect(ABSTRACT)",
    "TCP": "socket.create_connection(('127.0.0.1', 22), 1)",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "signal": "os.kill(OUTER, 0)",
    "limits of the caller": "resource.prlimit(OUTER, resource.RLIMIT_NOFILE, (1, 1))",
    "priority of the caller": "os.setpriority(os.PRIO_PROCESS, OUTER, 19)",
    "run a program there": "subprocess.run([HOME + '/key'], check=True)",
}
TOOLS = (
    "import ctypes, os, resource, signal, socket, subprocess, sys\n"
    "def call(number, *arguments):\n    libc = ctypes.CDLL(None, use_errno=True)\n"
    "    if libc.syscall(number, *arguments) < 0: raise OSError(ctypes.get_errno(), 'refused')\n"
)


@pytest.mark.parametrize("how", CONFINED)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_outside_is_reached(outside: Path, how: Isolation, attack: str) -> None:
    names = {"HOME": str(outside), "KEY": f"{outside}/key", "OUTER": os.getpid()}
    names |= {
        "DATAGRAMS": os.readlink(outside / "datagrams"),
        "SOCKET": os.readlink(outside / "socket"),
        "ABSTRACT": f"\0kimi-lite-test-{os.getpid()}",
    }
    before, python, null = (
        state(outside),
        os.stat(os.path.realpath(sys.executable)).st_mode,
        os.stat("/dev/null").st_mode,
    )
    code = TOOLS + "".join(f"{name} = {value!r}\n" for name, value in names.items())
    shown = run(
        code
        + f"try:\n    {ATTACKS[attack]}\nexcept OSError as error: print('refused', error.errno)\nelse: print('DONE')",
        how=how,
    )
    harmless = how.is_separate and attack == "mode of what stdin is"
    assert shown.startswith("refused"), shown
    assert not harmless or shown == f"refused {errno.EROFS}"
    assert state(outside) == before
    assert os.stat(os.path.realpath(sys.executable)).st_mode == python
    assert os.stat("/dev/null").st_mode == null
    assert "s3cret" not in shown


@needs_namespaces
def test_what_is_outside_is_not_even_seen(outside: Path) -> None:
    names = f"[{str(outside)!r}, '/root/.ssh', '/var', '/etc/passwd', '/proc/{os.getpid()}', '/run', '/sys/class']"
    assert run(f"import os; print([name for name in {names} if os.path.exists(name)])") == "[]"
    assert run("import os; print(sorted(int(n) for n in os.listdir('/proc') if n.isdigit())[-1] < 9)") == "True"
    assert run("import os; print(os.getuid(), os.getppid())") == "1000 1"


@pytest.mark.parametrize("how", CONFINED)
def test_every_refused_call_is_refused(how: Isolation) -> None:
    refused = python_child.refused_calls(how.is_separate)
    code = TOOLS + (
        f"for number, wanted in {refused!r}.items():\n    try: call(number, 0, 0, 0, 0, 0, 0)\n"
        "    except OSError as error:\n        if error.errno != wanted: print(number, error.errno)\n"
        "    else: print(number, 'done')\n"
        "for number in (457, 463, 9999, 0x40000000 + 41):\n    try: call(number)\n"
        "    except OSError as error: print(error.errno, end=' ')\n"
        "for flag in (17, 25, 26, 27, 28, 29, 30):\n    try: call(CLONE, 1 << flag | 17, 0, 0, 0, 0)\n"
        "    except OSError as error: print(error.errno, end=' ')\n"
    ).replace("CLONE", str(python_child._CLONE[os.uname().machine]))
    unknown, never = errno.ENOSYS, errno.EPERM
    assert run(code, how=how) == " ".join(map(str, [unknown] * 4 + [never] * 7)) + " "


def test_nothing_stays_in_memory_or_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    key, name = 0x52000000 + os.getpid() % 0xFFFFFF, f"kimi-lite-left-{os.getpid()}"
    code = TOOLS + (
        f"libc = ctypes.CDLL(None)\nlibc.shmget({key}, 1 << 20, 0o1600)\n"
        f"libc.msgget({key}, 0o1600); libc.semget({key}, 1, 0o1600)\nopen('left', 'w').write('x')\n"
        f"for folder in ('/dev/shm', '/tmp', '/var/tmp', '/dev/mqueue', {str(tmp_path)!r}):\n"
        f"    try: open(folder + '/{name}', 'w').write('x')\n    except OSError: pass\n"
    )
    for how in (HERE, WITHOUT_NAMESPACES):
        run(code, how=how)
    assert os.listdir(tmp_path) == []
    assert not [
        folder for folder in ("/dev/shm", "/tmp", "/var/tmp", "/dev/mqueue") if os.path.exists(f"{folder}/{name}")
    ]
    for kind in ("shm", "msg", "sem"):
        assert str(key) not in Path(f"/proc/sysvipc/{kind}").read_text().split()


@needs_namespaces
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("/usr/bin/python3"), reason="needs root and a system Python")
def test_as_another_user() -> None:
    """What an ordinary user's script can do to that user's files."""
    folder = Path(f"/tmp/kimi-lite-test-user-{os.getpid()}")
    try:
        for path in (folder, folder / "home", folder / "work"):
            path.mkdir(mode=0o755)
        shutil.copy(CHILD, folder / "child.py")
        (folder / "home/key").write_text("s3cret")
        (folder / "work/script.py").write_text(
            "import os\nfor do in (lambda p: open(p).read(), lambda p: os.chmod(p, 0o666), os.listdir):\n"
            f"    try: print('DONE', do('{folder}/home/key'))\n    except OSError: print('refused')\nprint(os.getuid())"
        )
        for path in folder.rglob("*"):
            os.chown(path, 65534, 65534)
        command = [
            "/usr/bin/python3",
            "-I",
            folder / "child.py",
            folder / "work/script.py",
            "2000000000",
            "10",
            "60000000",
        ]
        done = subprocess.run(
            [*map(str, command), "1", "1"], user=65534, group=65534, extra_groups=[], cwd=folder / "work",
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.stdout == "refused\nrefused\nrefused\n1000\n", done.stderr
        assert done.returncode == 0
    finally:
        shutil.rmtree(folder)


def test_the_users_environment_and_folder_are_not_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    shown = run(
        "import os; print(dict(os.environ), os.listdir('.'), os.getcwd()); print(open('/proc/self/environ').read())"
    )
    assert "sk-secret" not in shown
    assert "['script.py']" in shown
    assert os.getcwd() not in shown


DENIALS = {  # what systems refuse, and what is left then
    "nothing": ({}, lambda found: found == {"namespaces": 1, "landlock": HERE.landlock_version, "seccomp": 1}),
    "namespaces, as containers do": ({272: errno.EPERM, 97: errno.EPERM}, lambda found: not found["namespaces"]),
    "mounts, as AppArmor does": ({165: errno.EACCES, 40: errno.EACCES}, lambda found: not found["namespaces"]),
    "pivot_root": ({155: errno.EPERM, 41: errno.EPERM}, lambda found: not found["namespaces"]),
    "Landlock": ({444: errno.ENOSYS}, lambda found: not found["landlock"]),
    "Landlock, switched off": ({444: errno.EOPNOTSUPP}, lambda found: not found["landlock"]),
}


@needs_namespaces
@needs_seccomp
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")
@pytest.mark.parametrize("denial", DENIALS)
def test_what_is_denied_is_found_out(denial: str, tmp_path: Path) -> None:
    """By doing: a filter below the probe refuses the system calls, as other systems do."""
    refused, is_right = DENIALS[denial]
    code = (
        f"import os, sys\nsys.path.insert(0, {os.path.dirname(CHILD)!r})\nimport python_child as c\n"
        f"c._prctl(c._NO_NEW_PRIVILEGES, 1)\nc.refuse_calls({refused!r})\n"
        f"os.execv(sys.executable, [sys.executable, '-I', {CHILD!r}, 'probe', {str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert is_right(json.loads(done.stdout)), done.stdout


def test_bubblewrap_is_used_where_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the program that starts what it is told to, in no namespace: what is tried is the choice."""
    from kimi_lite.apps.tools import python

    stand_in = tmp_path / "bin/bwrap"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(python.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    (tmp_path / "work").mkdir()
    how = python._with_bwrap(WITHOUT_NAMESPACES, tmp_path / "work")
    assert how.bwrap == str(stand_in)
    assert how.risks == (() if how.has_seccomp else how.risks)
    stand_in.write_text("#!/bin/sh\nexit 1\n")
    assert python._with_bwrap(WITHOUT_NAMESPACES, tmp_path / "work") == WITHOUT_NAMESPACES


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Isolation(True, 7, True), []),
        (Isolation(True, 0, True), []),
        (Isolation(False, 7, True), ["names, sizes and dates"]),
        (Isolation(False, 1, True), ["names, sizes and dates", "end your other programs"]),
        (Isolation(False, 0, True), ["read and write every file", "end your other programs"]),
        (Isolation(False, 7, False), ["the network", "change modes and dates", "shared memory"]),
        (OPEN, ["the network", "read and write every file", "end your other programs", "shared memory"]),
    ],
)
def test_the_question_says_what_is_not_confined(how: Isolation, words: list[str]) -> None:
    from kimi_lite.apps.tools.box import ToolBox
    from kimi_lite.text.tool_calls import ToolCall

    tool, asked = python_tool(how, Limits(time_s=5.0)), []
    assert len(tool.risks) == len(words)
    assert all(word in risk for word, risk in zip(words, tool.risks, strict=True))
    box = ToolBox([tool], allow=["*"])
    said = box.call(
        ToolCall("id", "run_python", '{"code": "print(6 * 7)"}'), lambda question: asked.append(question) or "no"
    )
    assert bool(asked) == bool(words)  # "*" does not allow what is not confined
    assert "did not allow" in said if words else said == "42"
    for question in asked:
        assert question.default == "n"
        assert "[N]o" in question.prompt
        assert all(any(word in line for line in question.lines) for word in words)


def test_the_description_says_what_it_is() -> None:
    tool = python_tool(HERE, Limits(time_s=5.0))
    assert "At most 5 s" in tool.description
    assert ("No network" in tool.description) == (HERE.has_namespaces or HERE.has_seccomp)
    assert tool.run({"code": "print(6 * 7)"}, lambda: False) == "42"
    assert "No network" not in python_tool(OPEN).description


def test_a_run_costs_little() -> None:
    """Of the CPU, which a busy machine does not change as much as time: about 0.06 s, of which two Pythons 0.04 s."""
    took = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("print(1)")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.3, took
