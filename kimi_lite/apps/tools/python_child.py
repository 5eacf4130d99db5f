"""The process that runs a model's Python: `python -I python_child.py SCRIPT MEMORY_BYTES CPU_S FILE_BYTES SEPARATE
CONFINE`.

Limits itself, for good, then becomes the script. Started by `apps.tools.python`, which also ends it; imports nothing of
ours. SEPARATE "1": without a network, and nothing that the script starts lives on. CONFINE "1": it reads Python and the
system's libraries, and writes in its own folder, nothing else. Ends with code 97 where the system does not allow what
is asked for.
"""

import ctypes
import os
import resource
import runpy
import signal
import struct
import sys

NOT_ALLOWED_EXIT = 97
_NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET
_PARENT_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38  # prctl
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, the same on every architecture
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_ON_FILES = (
    _EXECUTE | 1 << 1 | _READ_FILE | 1 << 14
)  # rights that a rule for a file may give: 1 is writing, 14 truncating
_READABLE = (
    *("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types"),
    *(
        "/dev/null",
        "/dev/zero",
        "/dev/random",
        "/dev/urandom",
        "/proc/self",
        "/proc/cpuinfo",
        "/proc/meminfo",
        "/proc/stat",
    ),
    "/sys/devices/system/cpu",
)


def separate() -> bool:
    """Go where there is no network, and be the first process there: the others end with it, and it ends with the outer
    one."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_NEW_USER | _NEW_PIDS | _NEW_NETWORK) != 0:
            return False
    except (OSError, AttributeError):
        return False
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)
    libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    return True


def confine(folder: str) -> bool:
    """Give up all files but Python, the system's libraries, and those in `folder`: docs.kernel.org,
    userspace-api/landlock."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        version = libc.syscall(_CREATE_RULESET, None, 0, 1)
        if version < 1:
            return False
        rights = (
            (1 << min(12 + version, 15)) - 1 if version > 1 else (1 << 13) - 1
        )  # version 2 adds moving, 3 truncating
        ruleset = libc.syscall(_CREATE_RULESET, struct.pack("Q", rights), 8, 0)
        reading = _EXECUTE | _READ_FILE | _READ_DIR
        places = dict.fromkeys((*_READABLE, sys.prefix, sys.base_prefix, *sys.path), reading)
        for path, allowed in {**places, "/dev/null": rights, folder: rights}.items():
            _allow(libc, ruleset, path, allowed & rights)
        return libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    except (OSError, AttributeError):
        return False


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """These rights beneath `path`, where there is such a path."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    rights &= ~0 if os.path.isdir(path) else _ON_FILES
    if libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0) != 0:
        raise OSError(ctypes.get_errno(), path)
    os.close(place)


def limit(memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Soft and hard limits are the same: the script cannot raise them."""
    wanted = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 256,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def main() -> None:
    script, memory_bytes, cpu_s, file_bytes, is_separate, is_confined = sys.argv[1:]
    if is_separate == "1" and not separate():
        sys.exit(NOT_ALLOWED_EXIT)
    if is_confined == "1" and not confine(os.path.dirname(script)):
        sys.exit(NOT_ALLOWED_EXIT)
    limit(int(memory_bytes), int(cpu_s), int(file_bytes))
    sys.argv[:] = [script]
    sys.path.insert(0, os.getcwd())
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
