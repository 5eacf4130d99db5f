"""Loads and launches compiled kernels through the driver itself (libcuda, by ctypes), in the place of Triton's driver.

Triton compiles a module of C at the first launch, and up to 3.6 another one for every kernel's signature: that needs a
C compiler and Python.h, which a plain installation has not. The compiler of kernels itself needs neither. This object
answers what `triton.runtime.driver.active` is asked (Triton 3.5 to 3.9 ask the same), so that `kernel[grid](...)`, the
choice of a specialization and the cache on disk stay Triton's. A launch costs some microseconds more than from C: what
repeats thousands of times a second is held by CUDA graphs.

    install()   once, before the first launch (`native.gpu.support.why_unusable` does)

Parameters follow `backends/nvidia/driver.py`: the arguments that are no compile-time constants, in the order of the
kernel's, each as wide as the signature says, then two pointers to scratch memory that none of our kernels needs.
`cuFuncGetParamInfo` (drivers for CUDA 12.4 and newer) is asked once a kernel whether it expects just these.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime import driver as triton_driver

_FORMATS = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"},
    **{"u64": "Q", "fp16": "e", "bf16": "H", "fp32": "f", "f32": "f", "fp64": "d"},
}
_POINTER = "Q"
_NUM_SCRATCH = 2  # pointers behind the arguments: global and profiling scratch
_PLAIN_SHARED_BYTES = 48 << 10  # more must be asked for
_OUT_OF_MEMORY = 2
# Of cuda.h: CUdevice_attribute, CUfunction_attribute, CUpointer_attribute, CUfunc_cache
_DEVICE_SHARED_OPTIN, _DEVICE_REGISTERS, _DEVICE_MULTIPROCESSORS, _DEVICE_WARP_SIZE = 97, 12, 16, 10
_FUNCTION_MAX_THREADS, _FUNCTION_STATIC_SHARED, _FUNCTION_LOCAL_BYTES, _FUNCTION_REGISTERS = 0, 1, 3, 4
_FUNCTION_MAX_DYNAMIC_SHARED, _POINTER_ON_DEVICE, _PREFER_SHARED = 8, 3, 1


class Library(Protocol):
    """libcuda as ctypes gives it: every function of cuda.h is an attribute that returns a CUresult."""

    def __getattr__(self, name: str) -> Any: ...


class Binary(NamedTuple):
    """A loaded kernel, in the order in which Triton takes it."""

    module: int
    function: int
    num_registers: int
    num_spilled: int  # 32-bit words of stack a thread
    max_threads: int


class Cuda:
    """Calls into libcuda that raise instead of returning an error."""

    def __init__(self, library: Library | None = None) -> None:
        """Raises OSError where there is no driver."""
        self._library = ctypes.CDLL("libcuda.so.1") if library is None else library
        self._thread = threading.local()
        self._launch = self._library.cuLaunchKernel  # told its types once: numbers go in as they are
        self._launch.argtypes = (ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)

    def call(self, name: str, *arguments: object) -> None:
        """torch.OutOfMemoryError where memory is missing, else RuntimeError with the driver's words, as torch's."""
        result = getattr(self._library, name)(*arguments)
        if result:
            self._raise(result, name)

    def number(self, name: str, *arguments: object) -> int:
        """What the function writes through its first parameter, an int."""
        found = ctypes.c_int()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value

    def handle(self, name: str, *arguments: object) -> int:
        """Likewise 64 bits: a handle or an address; 0 for none."""
        found = ctypes.c_void_p()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value or 0

    def bind(self, device: Callable[[], int]) -> None:
        """A thread that has not used the GPU yet has no context: it gets torch's, the device's primary one."""
        if getattr(self._thread, "is_bound", False):
            return
        if not self.handle("cuCtxGetCurrent"):
            context = self.handle("cuDevicePrimaryCtxRetain", ctypes.c_int(device()))
            self.call("cuCtxSetCurrent", ctypes.c_void_p(context))
        self._thread.is_bound = True

    def launch(self, function: int, place: tuple[int, ...], stream: int, addresses: ctypes.Array) -> None:
        """place: the grid, the threads of a program in three directions, bytes of shared memory."""
        result = self._launch(function, *place, stream, addresses, None)
        if result:
            self._raise(result, "cuLaunchKernel")

    def parameter_sizes(self, function: int) -> list[int] | None:
        """Bytes of each parameter that a loaded kernel expects; None where the driver is too old to tell."""
        if not hasattr(self._library, "cuFuncGetParamInfo"):
            return None
        sizes, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
        places = ctypes.byref(offset), ctypes.byref(size)
        while not self._library.cuFuncGetParamInfo(ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), *places):
            sizes.append(size.value)
        return sizes

    def _raise(self, result: int, name: str) -> None:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(ctypes.c_int(result), ctypes.byref(text))
        words = text.value.decode() if text.value else f"error {result}"
        kind = torch.OutOfMemoryError if result == _OUT_OF_MEMORY else RuntimeError
        raise kind(f"CUDA error: {words} ({name})")


class Parameters:
    """How a kernel of this signature takes its arguments: one block of memory, an address for each parameter."""

    def __init__(self, cuda: Cuda, signature: Sequence[str]) -> None:
        """signature: a Triton type for each argument, "constexpr" for those that are compiled in."""
        self._cuda = cuda
        self._places = [at for at, kind in enumerate(signature) if kind != "constexpr"]
        kinds = [signature[at] for at in self._places]
        for kind in kinds:
            assert kind[0] == "*" or kind in _FORMATS, f"no kernel of ours takes a {kind}"
        self._pointers = [i for i, kind in enumerate(kinds) if kind[0] == "*"]
        self._halves = [i for i, kind in enumerate(kinds) if kind == "bf16"]
        formats = [_POINTER if kind[0] == "*" else _FORMATS[kind] for kind in kinds] + [_POINTER] * _NUM_SCRATCH
        self.sizes = [struct.calcsize(each) for each in formats]
        self._struct = struct.Struct("@" + "".join(formats))  # each aligned to its size
        ends = [struct.calcsize("@" + "".join(formats[: i + 1])) for i in range(len(formats))]
        self._block = ctypes.create_string_buffer(self._struct.size)
        start = ctypes.addressof(self._block)
        places = [start + end - size for end, size in zip(ends, self.sizes, strict=True)]
        self.addresses = (ctypes.c_void_p * len(places))(*places)  # what a launch takes

    def write(self, arguments: Sequence[object]) -> None:
        """All of the kernel's arguments, constants too: their values go where the addresses point."""
        values = [arguments[at] for at in self._places]
        for i in self._pointers:
            values[i] = self._address(values[i])
        for i in self._halves:
            values[i] = struct.unpack("I", struct.pack("f", values[i]))[0] >> 16
        self._struct.pack_into(self._block, 0, *values, *[0] * _NUM_SCRATCH)

    def _address(self, argument: object) -> int:
        """As the GPU knows it: pinned host memory may have another address there, pageable memory none."""
        if argument is None or isinstance(argument, int):
            return argument or 0
        address = argument.data_ptr()
        if address == 0 or argument.is_cuda:
            return address
        try:
            return self._cuda.handle(
                "cuPointerGetAttribute", ctypes.c_int(_POINTER_ON_DEVICE), ctypes.c_uint64(address)
            )
        except RuntimeError as error:
            raise ValueError(f"a kernel was given a tensor of the CPU that is not pinned: {argument.shape}") from error


class Launcher:
    """Launches one compiled kernel; Triton makes one for each and calls it with everything."""

    def __init__(self, cuda: Cuda, device: Callable[[], int], source: Any, metadata: Any) -> None:
        """device: which one is current. source: the kernel with its `signature`, a type for each argument. metadata:
        the compiler's."""
        assert metadata.num_ctas == 1 and not metadata.launch_cooperative_grid and not metadata.launch_pdl, metadata
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0, metadata
        self._cuda, self._device, self._metadata = cuda, device, metadata
        self.parameters = Parameters(cuda, list(source.signature.values()))
        self._lock = threading.Lock()
        self._checked: int | None = None  # the function whose parameters were compared

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: int,
        packed_metadata: object,
        launch_metadata: object,
        enter_hook: Any,
        exit_hook: Any,
        *arguments: object,
    ) -> None:
        if grid_x * grid_y * grid_z == 0:
            return
        self._cuda.bind(self._device)
        if function != self._checked:
            self._check(function)
        if enter_hook is not None:
            enter_hook(launch_metadata)
        place = (grid_x, grid_y, grid_z, 32 * self._metadata.num_warps, 1, 1, self._metadata.shared)
        with self._lock:  # the block is one; the driver copies it before the launch returns
            self.parameters.write(arguments)
            self._cuda.launch(function, place, stream, self.parameters.addresses)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def _check(self, function: int) -> None:
        sizes = self._cuda.parameter_sizes(function)
        assert sizes is None or sizes == self.parameters.sizes, (self._metadata.name, sizes, self.parameters.sizes)
        self._checked = function


class Utilities:
    """What Triton asks of a driver besides launches."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda

    def load_binary(self, name: str, machine_code: bytes, shared_bytes: int, device: int) -> Binary:
        """A kernel of this name onto the GPU, with as much shared memory as it wants."""
        cuda = self._cuda
        cuda.bind(lambda: device)
        module = cuda.handle("cuModuleLoadData", ctypes.c_char_p(machine_code))
        function = cuda.handle("cuModuleGetFunction", ctypes.c_void_p(module), ctypes.c_char_p(name.encode()))
        if shared_bytes > _PLAIN_SHARED_BYTES:
            most = cuda.number("cuDeviceGetAttribute", ctypes.c_int(_DEVICE_SHARED_OPTIN), ctypes.c_int(device))
            dynamic = ctypes.c_int(most - self._of(function, _FUNCTION_STATIC_SHARED))
            kernel = ctypes.c_void_p(function)
            cuda.call("cuFuncSetCacheConfig", kernel, ctypes.c_int(_PREFER_SHARED))
            cuda.call("cuFuncSetAttribute", kernel, ctypes.c_int(_FUNCTION_MAX_DYNAMIC_SHARED), dynamic)
        return Binary(
            module,
            function,
            self._of(function, _FUNCTION_REGISTERS),
            self._of(function, _FUNCTION_LOCAL_BYTES) // 4,
            self._of(function, _FUNCTION_MAX_THREADS),
        )

    def unload_module(self, module: int) -> None:
        """Kernels stay for as long as the process: graphs may hold them."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        asked = {
            "max_shared_mem": _DEVICE_SHARED_OPTIN,
            "max_num_regs": _DEVICE_REGISTERS,
            "multiprocessor_count": _DEVICE_MULTIPROCESSORS,
            "warpSize": _DEVICE_WARP_SIZE,
        }
        number, where = self._cuda.number, ctypes.c_int(device)
        return {name: number("cuDeviceGetAttribute", ctypes.c_int(which), where) for name, which in asked.items()}

    def _of(self, function: int, attribute: int) -> int:
        return self._cuda.number("cuFuncGetAttribute", ctypes.c_int(attribute), ctypes.c_void_p(function))


class CudaDriver(GPUDriver):
    """`triton.runtime.driver.active` without a compiler. Device, stream and capability are torch's current ones."""

    def __init__(self, cuda: Cuda | None = None) -> None:
        super().__init__()
        self.cuda = cuda or Cuda()
        self.utils = Utilities(self.cuda)

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(self.cuda, self.get_current_device, source, metadata)

    @staticmethod
    def is_active() -> bool:
        return torch.cuda.is_available()

    def get_current_target(self) -> GPUTarget:
        major, minor = self.get_device_capability(self.get_current_device())
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.get_current_device())

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no C is written here")

    def get_benchmarker(self) -> Any:
        from triton.testing import do_bench

        return do_bench


@cache
def _driver() -> CudaDriver:
    return CudaDriver()


def install() -> None:
    """From now on kernels are launched without Triton's own driver. Raises OSError where there is no libcuda."""
    triton_driver.set_active(_driver())


def uninstall() -> None:
    """Triton's own driver again, which is made now: that needs a C compiler."""
    triton_driver.reset_active()
