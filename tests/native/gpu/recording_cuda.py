"""A libcuda.so.1 that has no GPU behind it and writes down what it is told: what Triton's own launcher, which is C, and
ours pass to a driver becomes comparable byte by byte.

    library = build(folder)          # needs a C compiler
    library.expect(sizes)            # of the next launch's parameters: a driver knows them from the kernel
    ...                              # anything that launches
    library.launch()                 # the last one; library.log(): the calls that change something
"""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FUNCTION, MODULE, CONTEXT = 0xF00D, 0xB00C, 0xC0DE  # handles that it gives
STATIC_SHARED_BYTES, OPTIN_SHARED_BYTES = 1024, 101376
_SOURCE = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct { unsigned grid[3], block[3], shared; void *stream; void *attrs; unsigned num_attrs; } Config;
typedef struct { uint64_t count; unsigned grid[3], block[3], shared, num_attrs; uint64_t stream, function;
                 uint64_t num_bytes; unsigned char bytes[4096]; } Launch;

Launch last_launch;
char call_log[65536];
static int sizes[256], num_sizes, needs_context = 0;

void expect_parameters(const int *given, int count) { memcpy(sizes, given, count * sizeof(int)); num_sizes = count; }
void forget_context(void) { needs_context = 1; }
#define LOG(...) snprintf(call_log + strlen(call_log), sizeof call_log - strlen(call_log), __VA_ARGS__)

static int record(unsigned *grid, unsigned *block, unsigned shared, void *stream, unsigned num_attrs, void *function,
                  void **parameters) {
  unsigned char *at = last_launch.bytes;
  last_launch.count++;
  memcpy(last_launch.grid, grid, 12);
  memcpy(last_launch.block, block, 12);
  last_launch.shared = shared, last_launch.num_attrs = num_attrs;
  last_launch.stream = (uint64_t)stream, last_launch.function = (uint64_t)function;
  for (int i = 0; i < num_sizes; at += sizes[i++]) {
    if ((uint64_t)parameters[i] % sizes[i]) LOG("parameter %d is not aligned\n", i);
    memcpy(at, parameters[i], sizes[i]);
  }
  last_launch.num_bytes = at - last_launch.bytes;
  return 0;
}
int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  Config c = *config;
  return record(c.grid, c.block, c.shared, c.stream, c.num_attrs, function, parameters);
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  return record(grid, block, shared, stream, 0, function, parameters);
}
int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
  if ((int)index >= num_sizes) return 1;
  return *offset = 0, *size = sizes[index], 0;
}
int cuGetErrorString(int code, const char **text) { return *text = code == 2 ? "out of memory" : "invalid value", 0; }
int cuCtxGetCurrent(void **context) { return *context = needs_context ? 0 : (void *)CONTEXT, 0; }
int cuCtxSetCurrent(void *context) { return LOG("context %lx\n", (long)context), needs_context = 0, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(CONTEXT + (long)device), 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { return *value = which == 97 ? OPTIN : which, 0; }
int cuFuncGetAttribute(int *value, int which, void *function) { return *value = which == 1 ? STATIC : 100 + which, 0; }
int cuFuncSetAttribute(void *function, int which, int value) {
  return which == 8 ? LOG("attribute %d of %lx = %d\n", which, (long)function, value), 0 : 1;
}
int cuFuncSetCacheConfig(void *function, int which) { return LOG("cache of %lx = %d\n", (long)function, which), 0; }
int cuModuleLoadData(void **module, const char *image) {
  if (!strcmp(image, "too large")) return 2;
  return LOG("load %s\n", image), *module = (void *)MODULE, 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  return LOG("function %s of %lx\n", name, (long)module), *function = (void *)FUNCTION, 0;
}
int cuPointerGetAttribute(uint64_t *value, int which, uint64_t pointer) { return *value = pointer + PINNED_SHIFT, 0; }
int cuModuleUnload(void *module) { return 0; }
int cuCtxSetLimit(int which, size_t value) { return 0; }
int cuCtxGetLimit(size_t *value, int which) { return *value = 0, 0; }
int cuDriverGetVersion(int *version) { return *version = 12080, 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cuInit(unsigned flags) { return 0; }
"""
PINNED_SHIFT = 1 << 40  # between the host's address of pinned memory and the GPU's


class Launch(NamedTuple):
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    num_attributes: int
    stream: int
    function: int
    parameters: bytes  # their values, one after the other


class _Launch(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_uint64),
        *((name, ctypes.c_uint * 3) for name in ("grid", "block")),
        *((name, ctypes.c_uint) for name in ("shared", "num_attrs")),
        *((name, ctypes.c_uint64) for name in ("stream", "function", "num_bytes")),
        ("bytes", ctypes.c_ubyte * 4096),
    ]


class RecordingCuda:
    """`library`: what ctypes opened."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._last = _Launch.in_dll(self.library, "last_launch")
        self._log = (ctypes.c_char * 65536).in_dll(self.library, "call_log")

    def expect(self, sizes: Sequence[int]) -> None:
        self.library.expect_parameters((ctypes.c_int * len(sizes))(*sizes), len(sizes))

    def launch(self) -> Launch:
        last = self._last
        place = tuple(last.grid), tuple(last.block), last.shared, last.num_attrs, last.stream, last.function
        return Launch(*place, bytes(last.bytes[: last.num_bytes]))

    @property
    def num_launches(self) -> int:
        return self._last.count

    def log(self) -> str:
        """The calls since the last time."""
        text = self._log.value.decode()
        self._log.value = b""
        return text


def build(folder: Path) -> RecordingCuda:
    """Compiles it into the folder, under the driver's name."""
    source, target = folder / "recording.c", folder / "libcuda.so.1"
    names = {
        **{"FUNCTION": FUNCTION, "MODULE": MODULE, "CONTEXT": CONTEXT, "PINNED_SHIFT": f"{PINNED_SHIFT}ull"},
        **{"STATIC": STATIC_SHARED_BYTES, "OPTIN": OPTIN_SHARED_BYTES},
    }
    source.write_text("".join(f"#define {name} {value}\n" for name, value in names.items()) + _SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", str(target), str(source)], check=True)
    (folder / "libcuda.so").symlink_to(target.name)  # Triton 3.5 links this one
    return RecordingCuda(target)
