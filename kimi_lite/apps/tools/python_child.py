"""The processes that run a model's Python, started and explained by `apps.tools.python`; imports nothing of ours.

    python -I python_child.py SCRIPT MEMORY_BYTES TIME_S FILE_BYTES SEPARATE CONFINE [FILTER DISK_BYTES PROCESSES FD]
    python -I python_child.py probe FOLDER

Three processes: the *keeper* (this one), which counts what the script and its children use and ends them all; the
*init*, process 1 of new namespaces, with whose end the kernel ends everything in them; and the script, which gives up
what it must not do, for good.

SEPARATE "1": namespaces (user, PID, mount, network, IPC, host name). The script sees no process, network, shared memory
or file but its own and, read-only, Python's; "2": it is already in such (bubblewrap's). CONFINE "1": Landlock, which
allows the same files also where there are no namespaces. FILTER "1": seccomp, which takes away system calls that reach
past both. Ends with code 97 where the system does not allow what is asked for. FD is told how it ended:
{"code": ..., "ending": "" | "time" | "memory" | ...}.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import stat
import struct
import subprocess
import sys
import time

NOT_ALLOWED_EXIT = 97
INNER_USER = 1000  # the user id of the script in its namespace: never root
POLL_S, WATCH_S = 0.004, 0.03
_KEEPER_S = 5.0  # for killing what is left

_PARENT_DEATH_SIGNAL, _DUMPABLE, _DROP_BOUND, _SECURE_BITS, _SUBREAPER, _NO_NEW_PRIVILEGES = (
    1,
    4,
    24,
    28,
    36,
    38,
)  # prctl
_ONLY_LOCKED_SECURE_BITS = 0x2F  # no root, no setuid fix-up, both locked; keep-caps locked off
_NEW = {"mount": 1 << 17, "uts": 1 << 26, "ipc": 1 << 27, "user": 1 << 28, "pid": 1 << 29, "network": 1 << 30}
_NEW_ANY = sum(_NEW.values()) | 1 << 25  # and control groups
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 1 << 12, 1 << 14, 1 << 18, 2  # mount, umount2
_NO_SETUID, _NO_DEVICES, _NO_PROGRAMS = 1 << 1, 1 << 2, 1 << 3
_READ_ONLY = 1 << 0  # mount, mount_setattr
_SET_MOUNT, _AT_CWD, _AT_RECURSIVE = 442, -100, 0x8000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, the same on every architecture
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_ON_FILES = _EXECUTE | 1 << 1 | _READ_FILE | 1 << 14  # rights for a file: 1 is writing, 14 truncating
_READABLE = (
    *(
        "/usr",
        "/nix/store",
        "/lib",
        "/lib32",
        "/lib64",
        "/bin",
        "/sbin",
        "/etc/alternatives",
        "/etc/ld.so.cache",
        "/etc/localtime",
    ),
    *("/etc/mime.types", "/sys/devices/system/cpu"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_ABOUT_ITSELF = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat")

# System calls that are refused, by architecture (linux/asm/unistd.h). Left out: what an ordinary process may not do
# anyway. Newer calls than `_LAST_KNOWN` do not exist for the script.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LAST_KNOWN = 456
_ALWAYS_REFUSED = {
    "x86_64": {
        **dict.fromkeys((29, 30, 31, 64, 68, 240), "shared memory, semaphores and queues of System V; mq_open"),
        **dict.fromkeys((101, 310, 311, 312), "ptrace, process_vm_readv, process_vm_writev, kcmp"),
        **dict.fromkeys(
            (155, 161, 165, 166, 272, 303, 304, 308), "pivot_root, chroot, mounts, unshare, handles, setns"
        ),
        **dict.fromkeys((212, 248, 249, 250, 298, 300, 301, 321, 323), "keys, perf, fanotify, bpf, userfaultfd"),
        **dict.fromkeys((135, 154, 319), "personality, modify_ldt, memfd_create"),
    },
    "aarch64": {
        **dict.fromkeys((180, 186, 190, 194, 195, 196), "shared memory, semaphores and queues of System V; mq_open"),
        **dict.fromkeys((117, 270, 271, 272), "ptrace, process_vm_readv, process_vm_writev, kcmp"),
        **dict.fromkeys((39, 40, 41, 51, 97, 264, 265, 268), "mounts, pivot_root, chroot, unshare, handles, setns"),
        **dict.fromkeys((18, 217, 218, 219, 241, 262, 263, 280, 282), "keys, perf, fanotify, bpf, userfaultfd"),
        **dict.fromkeys((92, 279), "personality, memfd_create"),
    },
}
_ALWAYS_REFUSED_EVERYWHERE = (
    *(424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 440),  # pidfd, io_uring, mounts, process_madvise
    *(442, 443, 447),  # mount_setattr, quotactl_fd, memfd_secret
)
_SOCKET = {"x86_64": (41, 42), "aarch64": (198, 203)}  # socket, connect
# Pairs stay, but those of datagrams: one can send from them to any local socket by its path.
_SOCKETPAIR, _UNIX, _STREAM, _PACKETS = {"x86_64": 53, "aarch64": 199}, 1, 1, 5
_CLONE, _CLONE3, _PRLIMIT = {"x86_64": 56, "aarch64": 220}, 435, {"x86_64": 302, "aarch64": 261}
# Without a mount namespace: Landlock has no right for modes, owners, dates and attributes of files outside, and before
# version 3 none for truncating.
_ON_ANY_FILE = {
    "x86_64": (76, 90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235, 260, 261, 268, 280, 452),
    "aarch64": (5, 6, 7, 14, 15, 16, 45, 52, 53, 54, 55, 88, 452),
}
# Without a PID namespace: queued signals and priorities of others. kill, which is needed, is Landlock's to scope.
_ON_ANY_PROCESS = {
    "x86_64": (129, 141, 142, 144, 203, 251, 297, 314),
    "aarch64": (30, 118, 119, 122, 138, 140, 240, 274),
}


class NotAllowed(Exception):
    """This system does not allow it; says what failed."""


def main() -> None:
    if sys.argv[1] == "probe":
        print(json.dumps(probe(sys.argv[2])))
        return
    script, memory_bytes, time_s, file_bytes, is_separate, is_confined, *more = sys.argv[1:]
    is_filtered, disk_bytes, num_processes, report_fd = [*more, *(is_confined, 1 << 28, 64, -1)[len(more) :]]
    if int(report_fd) >= 0:
        os.set_inheritable(int(report_fd), False)
    limits = Limits(int(memory_bytes), float(time_s), int(file_bytes), int(disk_bytes), int(num_processes))
    keeper = Keeper(script, limits, is_separate in ("1", "2"), is_confined == "1", is_filtered == "1")
    keeper.makes_place = is_separate == "1"
    code, ending = keeper.run()
    if int(report_fd) >= 0:
        os.write(int(report_fd), json.dumps({"code": code, "ending": ending}).encode())
    if ending:
        os._exit(1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), -code)
    os._exit(code)


class Limits:
    """Of one run: memory of all its processes together, seconds, bytes of one file, of its folder, processes."""

    def __init__(self, memory_bytes: int, time_s: float, file_bytes: int, disk_bytes: int, num_processes: int) -> None:
        self.memory_bytes, self.time_s, self.file_bytes = memory_bytes, time_s, file_bytes
        self.disk_bytes, self.num_processes = disk_bytes, num_processes


class Keeper:
    """Starts the script, counts what it and its children use, and leaves none of them behind."""

    def __init__(self, script: str, limits: Limits, is_separate: bool, is_confined: bool, is_filtered: bool) -> None:
        self.script, self.folder, self.limits = script, os.path.dirname(script), limits
        self.is_separate, self.is_confined, self.is_filtered = is_separate, is_confined, is_filtered
        self.makes_place = is_separate  # else bubblewrap did
        self._is_stopped, self._code_of_init = False, 0

    def run(self) -> tuple[int, str]:
        """Its exit code (negative: the signal), and why it was ended: "", "stopped", "time", "memory", ..."""
        end_s = time.monotonic() + self.limits.time_s
        signal.signal(signal.SIGTERM, self._stop)
        _prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        with open(self.script, "rb") as file:
            code = file.read()
        if self.makes_place:
            enter_namespaces()
        else:
            become_subreaper()
        status_in, status_out = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(status_in)
            _in_child(lambda: self._first_process(code, status_out))
        os.close(status_out)
        ending = self._watch(child, end_s)
        end_descendants()  # where there are namespaces, all of them end with init
        status = os.read(status_in, 8)  # nothing: init itself was refused something, or killed
        return (struct.unpack("q", status)[0] if status else self._code_of_init), ending

    def _stop(self, *_: object) -> None:
        self._is_stopped = True

    def _first_process(self, code: bytes, status_out: int) -> None:
        """Init: makes the place, starts the script in it, tells how it ended. All else ends with it."""
        _prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.setsid()  # signals of the script to its process group are not the keeper's
        if self.makes_place:
            enter_root(self.folder, self.limits.disk_bytes)
            with open(self.script, "wb") as file:
                file.write(code)
        if self.is_separate:
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)  # the one that came is the outside's
        script = os.fork()
        if script == 0:
            os.close(status_out)
            _in_child(self._become_script)
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == script:
                os.write(status_out, struct.pack("q", os.waitstatus_to_exitcode(status)))
                return

    def _become_script(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        os.chdir(self.folder)
        limit(self.limits, self.is_separate)
        if self.makes_place:
            drop_capabilities()
        if self.is_confined or self.is_filtered or self.is_separate:
            _prctl(_NO_NEW_PRIVILEGES, 1)
        if self.is_confined:
            confine([self.folder, *(("/tmp", "/dev/shm") if self.is_separate else ())], self.is_separate)
        if self.is_filtered:
            refuse_calls(refused_calls(self.is_separate))
        run_program(self.script)

    def _watch(self, child: int, end_s: float) -> str:
        """Wait for the first process; the reason where it has to be ended."""
        next_look_s = time.monotonic() + WATCH_S
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if self._is_stopped:
                return "stopped"
            if time.monotonic() > end_s:
                return "time"
            if time.monotonic() > next_look_s:
                if reason := self._excess():
                    return reason
                next_look_s = time.monotonic() + WATCH_S
            time.sleep(POLL_S)
        self._code_of_init = os.waitstatus_to_exitcode(ended[1])
        return ""

    def _excess(self) -> str:
        """What the group has too much of."""
        pids = descendants(os.getpid())
        if len(pids) > self.limits.num_processes + 1:  # init is ours
            return "processes"
        if _sum(pids, resident_bytes) > self.limits.memory_bytes and _sum(pids, owned_bytes) > self.limits.memory_bytes:
            return "memory"
        if not self.is_separate and folder_bytes(self.folder, pids) > self.limits.disk_bytes:
            return "disk"
        return ""


def end_descendants(seconds: float = _KEEPER_S) -> None:
    """Kill children, their children, ... until there are none; what they leave behind comes to a subreaper."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def become_subreaper() -> None:
    """Descendants whose parents end become ours, not the system's."""
    _prctl(_SUBREAPER, 1)


def run_program(*arguments: str) -> None:
    """Become Python with these arguments: as usual, but for the user's own packages."""
    os.execv(sys.executable, [sys.executable, "-E", "-s", *arguments])


def probe(folder: str) -> dict[str, int]:
    """What this system allows, found out by doing it: `namespaces`, `landlock` (its version; 0: none), `seccomp`."""

    def separate() -> None:
        enter_namespaces()
        inner = os.fork()
        if inner == 0:
            _in_child(lambda: (enter_root(folder, 1 << 20), drop_capabilities(), run_program("-c", "")))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))

    def filter_calls() -> None:
        _prctl(_NO_NEW_PRIVILEGES, 1)
        refuse_calls(refused_calls(False))

    def restrict() -> None:
        _prctl(_NO_NEW_PRIVILEGES, 1)
        confine([folder], is_separate=False)

    if sys.platform != "linux":
        return dict.fromkeys(("namespaces", "landlock", "seccomp"), 0)
    found = {"namespaces": _works(separate), "landlock": _works(restrict), "seccomp": _works(filter_calls)}
    return found | {"landlock": landlock_version() if found["landlock"] else 0}


def _works(attempt: object) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _in_child(attempt)
    return int(os.waitpid(child, 0)[1] == 0)


def enter_namespaces() -> None:
    """Where this process may do as it likes, and nothing of it reaches the outside; its children are in there."""
    user, group = os.geteuid(), os.getegid()
    _check(_libc().unshare(sum(_NEW.values()) - _NEW["mount"]), "unshare")
    for path, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INNER_USER} {user} 1"),
        ("gid_map", f"{INNER_USER} {group} 1"),
    ):
        with open(f"/proc/self/{path}", "w") as file:
            file.write(text)


def enter_root(folder: str, disk_bytes: int) -> None:
    """A root of our own: memory of at most `disk_bytes`, in it `folder`, /tmp and /dev/shm; Python and the system's
    libraries read-only at their places; and nothing else. The old root is gone."""
    libc = _libc()
    _check(libc.unshare(_NEW["mount"]), "unshare")  # here, not before: the keeper's root stays
    _check(libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None), "mount /")
    options = f"size={disk_bytes},nr_inodes=100000,mode=755".encode()
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _NO_SETUID | _NO_DEVICES, options), "mount tmpfs")
    for path in (*readable_paths(), *_DEVICES):
        _bind(path, folder)
    for path in ("/proc", "/tmp", "/dev/shm", folder):
        os.makedirs(folder + path, exist_ok=True)
    flags = _NO_SETUID | _NO_DEVICES | _NO_PROGRAMS | _READ_ONLY
    libc.mount(b"proc", os.fsencode(folder + "/proc"), b"proc", flags, None)  # where /proc is masked: without it
    os.chdir(folder)
    _check(libc.syscall(_PIVOT_ROOT.get(platform.machine(), -1), b".", b"."), "pivot_root")
    _check(libc.umount2(b".", _DETACH), "umount")
    os.chdir(folder)
    _prctl(_DUMPABLE, 0)  # nor can /proc/1 be opened, whose program and root are the outside's


def readable_paths() -> list[str]:
    """Python, its packages and the system's libraries, those that exist, and the links to them; outer ones first."""
    prefixes = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]
    # No more of sys.path: an editable installation is a project of the user's.
    packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    named = [path for path in (*_READABLE, *prefixes, *packages, sys.executable) if os.path.exists(path)]
    return sorted({path for name in named for path in _resolved(name)})


def _resolved(path: str) -> list[str]:
    """The links that a path leads over, each in the folder where it really is, and what the path leads to."""
    links, left, here = [], path.split("/")[::-1], "/"
    while left:
        part = left.pop()
        place = os.path.join(here, part) if part not in ("", ".", "..") else here
        if part == "..":
            here = os.path.dirname(here)
        elif os.path.islink(place):
            links.append(place)
            left += os.readlink(place).split("/")[::-1]
            here = "/" if os.path.isabs(os.readlink(place)) else here
        else:
            here = place
    return [*links, here]


def _bind(path: str, root: str) -> None:
    """`path` in the new root, read-only; a link as a link. What is there already came with a folder above it."""
    if os.path.lexists(root + path):
        return
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), root + path)
        return
    if os.path.isdir(path):
        os.mkdir(root + path)
    else:
        os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC))
    libc, place = _libc(), os.fsencode(root + path)
    _check(libc.mount(os.fsencode(path), place, None, _BIND | _RECURSIVE, None), f"bind {path}")
    wanted = struct.pack("QQQQ", _READ_ONLY | _NO_SETUID, 0, 0, 0)  # a device can be written, its mode not changed
    _check(libc.syscall(_SET_MOUNT, _AT_CWD, place, _AT_RECURSIVE, wanted, len(wanted)), f"read-only {path}")


def drop_capabilities() -> None:
    """Those that made the place; no program can give them back."""
    libc = _libc()
    for number in range(64):
        if libc.prctl(_DROP_BOUND, number, 0, 0, 0) != 0:
            break
    _check(libc.prctl(_SECURE_BITS, _ONLY_LOCKED_SECURE_BITS, 0, 0, 0), "securebits")
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)  # version 3; effective, permitted, inheritable
    _check(libc.capset(header, none), "capset")


def landlock_version() -> int:
    return max(_libc().syscall(_CREATE_RULESET, None, 0, 1), 0)


def confine(folders: list[str], is_separate: bool) -> None:
    """Give up all files but what is readable and, to write, those in `folders`: docs.kernel.org,
    userspace-api/landlock. From version 6 on also signals to and abstract sockets of processes outside."""
    libc, version = _libc(), landlock_version()
    if version < 1:
        raise NotAllowed("Landlock")
    rights = (1 << min(12 + version, 15)) - 1 if version > 1 else (1 << 13) - 1  # version 2 adds moving, 3 truncating
    attributes = [rights, *([3] if version >= 4 else ()), *([3] if version >= 6 else ())]  # TCP; sockets and signals
    packed = struct.pack(f"{len(attributes)}Q", *attributes)
    ruleset = libc.syscall(_CREATE_RULESET, packed, len(packed), 0)
    _check(ruleset, "Landlock's rules")
    reading = _EXECUTE | _READ_FILE | _READ_DIR
    about = ("/proc",) if is_separate else _ABOUT_ITSELF
    places = dict.fromkeys((*readable_paths(), *_DEVICES, *about), reading)
    for path, allowed in {**places, "/dev/null": rights, **dict.fromkeys(folders, rights)}.items():
        _allow(ruleset, path, allowed & rights)
    _check(libc.syscall(_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    """These rights beneath `path`, where there is such a path."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    rights &= ~0 if os.path.isdir(path) else _ON_FILES
    _check(_libc().syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0), path)
    os.close(place)


def refused_calls(is_separate: bool) -> dict[int, int]:
    """Numbers of system calls and the errors that they give here."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise NotAllowed(f"a filter for {machine}")
    refused = dict.fromkeys((*_ALWAYS_REFUSED[machine], *_ALWAYS_REFUSED_EVERYWHERE), errno.EPERM)
    if not is_separate:
        refused |= dict.fromkeys((*_ON_ANY_FILE[machine], *_ON_ANY_PROCESS[machine]), errno.EPERM)
    refused |= dict.fromkeys(_SOCKET[machine], errno.ENETUNREACH)
    return refused | {_CLONE3: errno.ENOSYS}  # its flags cannot be read here; libraries go back to clone


def refuse_calls(refused: dict[int, int]) -> None:
    """For good, for this process and all that it starts: seccomp(2), a program in classic BPF."""
    machine = platform.machine()
    load, equal, greater, any_of, mask, give = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
    number, architecture, first, second = 0, 4, 16, 24  # in struct seccomp_data; the last two are arguments
    kill, allow = 0x80000000, 0x7FFF0000

    def fail(code: int) -> int:
        return 0x00050000 | code

    program = [(load, 0, 0, architecture), (equal, 1, 0, _ARCHITECTURES[machine]), (give, 0, 0, kill)]
    program += [(load, 0, 0, number), (greater, 0, 1, _LAST_KNOWN), (give, 0, 0, fail(errno.ENOSYS))]  # also x32's
    for call, code in refused.items():
        program += [(equal, 0, 1, call), (give, 0, 0, fail(code))]
    program += [(equal, 0, 7, _SOCKETPAIR[machine]), (load, 0, 0, first), (equal, 0, 4, _UNIX)]
    program += [(load, 0, 0, second), (mask, 0, 0, 0xF), (equal, 2, 0, _STREAM), (equal, 1, 0, _PACKETS)]
    program += [(give, 0, 0, fail(errno.EPERM)), (load, 0, 0, number)]
    program += [(equal, 0, 3, _CLONE[machine]), (load, 0, 0, first), (any_of, 0, 1, _NEW_ANY)]
    program += [(give, 0, 0, fail(errno.EPERM)), (load, 0, 0, number)]
    program += [
        (equal, 0, 3, _PRLIMIT[machine]),
        (load, 0, 0, first),
        (equal, 1, 0, 0),
        (give, 0, 0, fail(errno.EPERM)),
    ]
    program += [(give, 0, 0, allow)]
    packed = b"".join(struct.pack("HBBI", *step) for step in program)
    steps = ctypes.create_string_buffer(packed, len(packed))
    head = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(steps))
    _check(_libc().prctl(22, 2, head, 0, 0), "seccomp")  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def limit(limits: Limits, is_separate: bool) -> None:
    """Of each process; soft and hard are the same: the script cannot raise them."""
    wanted = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_CPU: int(limits.time_s) + 1,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 256,
    }
    if is_separate:  # counted for the namespace alone; threads too. Root is not counted, but the keeper counts
        wanted[resource.RLIMIT_NPROC] = 16 * limits.num_processes
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, ..."""
    if not os.path.exists("/proc/self/task"):
        return _descendants_by_ps(pid)
    found, left = [], [pid]
    while left:
        parent = left.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                left += children
    return found


def _descendants_by_ps(pid: int) -> list[int]:
    """Where there is no /proc."""
    text = subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
    pairs, found = [tuple(map(int, line.split())) for line in text.split("\n") if line.strip()], [pid]
    for parent in found:
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found[1:]


def _sum(pids: list[int], measure: object) -> int:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += measure(pid)
    return total


def resident_bytes(pid: int) -> int:
    """In memory, pages that are shared with others included."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def owned_bytes(pid: int) -> int:
    """In memory, a page shared by n counted as 1/n; slow."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))


def folder_bytes(folder: str, pids: list[int]) -> int:
    """Of the files in a folder, at any depth, and of those that processes hold open though they are removed."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(parent, name))
                found[status.st_dev, status.st_ino] = status.st_blocks * 512
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                status = os.stat(f"/proc/{pid}/fd/{descriptor}")
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def _in_child(work: object) -> None:
    """All that a forked child does: it does not return."""
    code = 1
    try:
        work()
        code = 0
    except NotAllowed as error:
        print(f"python_child: {error}", file=sys.stderr)
        code = NOT_ALLOWED_EXIT
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _check(_libc().prctl(option, value, 0, 0, 0), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise NotAllowed(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
