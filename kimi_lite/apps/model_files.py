"""The files of a loaded model while it is in use: whether they are still what was loaded, and what happens when one of
them becomes shorter under the program.

Weights are read through memory maps, so a file that shrinks, or a disk that fails, is a SIGBUS in the middle of a
kernel: nothing can go on then, and Python code cannot run either (it would wait for the thread that faults). A small
machine function restores the terminal, says what happened, and ends the program.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

from kimi_lite.errors import KimiLiteError

_LOST = (
    "\nkimi-lite: The model's file could no longer be read: it became shorter, or its disk failed.\n"
    "Check it, then start again{more}.\n"
)
_SHOW_CURSOR = "\x1b[?25h"
_EXIT_CODE = 2  # as for everything that the user can fix
_TERMIOS_BYTES = 256  # more than any system's struct termios
_keep_alive: list[object] = []  # what the installed handler points to


class ModelFiles:
    """The files of the model at `path` as they are now: one file, its shards, or none (an endpoint)."""

    def __init__(self, path: Path) -> None:
        self._seen = {one: _state(one) for one in _files_of(path)}

    def changes(self) -> str:
        """A sentence, once, where a file was written since; KimiLiteError where one has become shorter.

        A file that was replaced by another one is still mapped as it was.
        """
        for path, seen in self._seen.items():
            now = _state(path)
            if seen is None or now is None or now[:2] != seen[:2] or now == seen:
                continue
            if now[2] < seen[2]:
                raise KimiLiteError(
                    f"The model's file {path} has become shorter since it was loaded: {now[2]:,} of {seen[2]:,} bytes.",
                    "Restore it, then start again.",
                )
            self._seen[path] = now
            return f"The model's file {path} was written since it was loaded; answers may be wrong. Start again."
        return ""


def guard_terminal(more: str = "") -> None:
    """From now on a SIGBUS restores the terminal as it is now, says what happened, and ends the program.

    `more` goes behind "start again".
    """
    if sys.platform == "win32":
        return
    address = _machine_function((_LOST.format(more=more) + (_SHOW_CURSOR if sys.stderr.isatty() else "")).encode())
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGBUS, address)


def _machine_function(message: bytes) -> int:
    """The address of `void handler(int)` that makes three system calls which are safe in a signal handler: tcsetattr,
    write, _exit."""
    from llvmlite import binding, ir

    libc = ctypes.CDLL(None)
    int32, int64 = ir.IntType(32), ir.IntType(64)
    termios, text = ctypes.create_string_buffer(_TERMIOS_BYTES), ctypes.create_string_buffer(message)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [int32]), "on_bus_error")
    builder = ir.IRBuilder(function.append_basic_block())

    def call(name: str, *arguments: tuple[ir.Type, int]) -> None:
        kind = ir.FunctionType(int32, [one for one, _ in arguments])
        address = ctypes.cast(getattr(libc, name), ctypes.c_void_p).value
        callee = builder.inttoptr(ir.Constant(int64, address), kind.as_pointer())
        builder.call(callee, [ir.Constant(one, value) for one, value in arguments])

    if libc.tcgetattr(0, termios) == 0:
        call("tcsetattr", (int32, 0), (int32, 0), (int64, ctypes.addressof(termios)))
    call("write", (int32, 2), (int64, ctypes.addressof(text)), (int64, len(message)))
    call("_exit", (int32, _EXIT_CODE))
    builder.ret_void()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    compiler = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    compiler.finalize_object()
    _keep_alive[:] = [termios, text, compiler]
    return compiler.get_function_address("on_bus_error")


def _files_of(path: Path) -> list[Path]:
    from kimi_lite.gguf.shards import find_shards

    try:
        return list(find_shards(path)) if path.is_file() else []
    except (KimiLiteError, OSError):
        return [path]


def _state(path: Path) -> tuple[int, int, int, int] | None:
    """(device, inode, bytes, time of the last write in ns)"""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
