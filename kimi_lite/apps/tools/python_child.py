"""The process that runs a model's Python: `python -I python_child.py SCRIPT MEMORY_BYTES CPU_S FILE_BYTES NETWORK`.

Limits itself, for good, then becomes the script. Started by `apps.tools.python`, which also ends it; imports nothing of ours.
NETWORK "off" leaves the network, and makes sure that nothing the script starts lives on, or ends with code 97 where the system
does not allow that.
"""

import ctypes
import os
import resource
import runpy
import signal
import sys

NO_NETWORK_EXIT = 97
_NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def separate() -> bool:
    """Go where there is no network, and be the first process there: the others end with it, and it ends with the outer one."""
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
    script, memory_bytes, cpu_s, file_bytes, network = sys.argv[1:]
    if network == "off" and not separate():
        sys.exit(NO_NETWORK_EXIT)
    limit(int(memory_bytes), int(cpu_s), int(file_bytes))
    sys.argv[:] = [script]
    sys.path.insert(0, os.getcwd())
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
