"""What our driver passes to libcuda for every launch of every kernel, next to what Triton's own driver passes, byte by
byte; and the same for loading a kernel. Prints how many; a difference ends it with an error.

    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python -m tests.native.gpu.compare_launchers FOLDER

Nothing is compiled but Triton's driver (and by Triton up to 3.6 a launcher for each signature), so that it takes
seconds: how parameters are passed follows from a launch's arguments alone. In a process of its own (test_cuda_driver).
"""

import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.compiler.compiler import make_backend
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

from kimi_lite.native.gpu.cuda_driver import Cuda, CudaDriver, Parameters
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.tools.kernels.launches import Launch, runtime_launches
from tests.native.gpu.recording_cuda import FUNCTION, OPTIN_SHARED_BYTES, RecordingCuda, build

STREAM, TARGET = 0x5A5A5A5A5A, GPUTarget("cuda", 90, 32)
SIZES = {
    **{"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u8": 1, "u16": 2, "u32": 4, "u64": 8},
    **{"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8},
}


def stand_in(driver: GPUDriver) -> GPUDriver:
    """A driver that finds a GPU, whatever torch says."""
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: STREAM
    driver.get_device_capability = lambda device=None: (9, 0)
    return driver


def tritons_own() -> GPUDriver:
    from triton.backends.nvidia import driver as nvidia

    own = stand_in(nvidia.CudaDriver())
    own.get_current_target = lambda: TARGET
    return own


def signature_of(launch: Launch) -> dict[str, str]:
    """As Triton specializes the kernel for these arguments: a type for each."""
    found: list[dict[str, str]] = []
    compile_kernel = JITFunction._do_compile

    def keep(kernel: Any, key: Any, signature: dict[str, str], *_: Any) -> None:
        found.append(signature)

    JITFunction._do_compile = keep
    try:
        launch.kernel.run(*launch.positional, grid=launch.grid, warmup=True, **launch.named)
    finally:
        JITFunction._do_compile = compile_kernel
    return found[0]


def metadata_of(num_warps: int, shared_bytes: int) -> SimpleNamespace:
    """What the compiler tells of a kernel."""
    return SimpleNamespace(
        name="a_kernel",
        num_warps=num_warps,
        num_ctas=1,
        shared=shared_bytes,
        cluster_dims=(1, 1, 1),
        global_scratch_size=0,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        instrumentation_mode="",
    )


def compare(
    cuda: RecordingCuda,
    drivers: list[GPUDriver],
    signature: dict[str, str],
    values: list[object],
    grid: tuple[int, ...],
    metadata: SimpleNamespace,
) -> None:
    """Launches with each driver; the recorded launches must be the same."""
    source = SimpleNamespace(signature=signature, constants={}, fn=None)
    sizes = [8 if kind[0] == "*" else SIZES[kind] for kind in signature.values() if kind != "constexpr"] + [8, 8]
    cuda.expect(sizes)
    grid = (*grid, 1, 1)[:3]
    recorded = []
    for driver in drivers:
        triton_driver.set_active(driver)
        launcher = driver.launcher_cls(source, metadata)
        before = cuda.num_launches
        launcher(*grid, STREAM, FUNCTION, make_backend(TARGET).pack_metadata(metadata), None, None, None, *values)
        assert cuda.num_launches == before + 1, (signature, cuda.num_launches)
        recorded.append(cuda.launch())
    assert recorded[0] == recorded[1], f"{signature}\n{recorded[0]}\n{recorded[1]}"
    assert recorded[0].stream == STREAM and recorded[0].grid == grid
    assert Parameters(drivers[0].cuda, list(signature.values())).sizes == sizes, signature


def compare_launch(cuda: RecordingCuda, drivers: list[GPUDriver], launch: Launch, shared_bytes: int) -> None:
    arguments = {**dict(zip(launch.kernel.arg_names, launch.positional, strict=False)), **launch.named}
    values = [arguments[name] for name in launch.kernel.arg_names]
    metadata = metadata_of(launch.named.get("num_warps", 4), shared_bytes)
    compare(cuda, drivers, signature_of(launch), values, launch.grid, metadata)


def compare_types(cuda: RecordingCuda, drivers: list[GPUDriver]) -> None:
    """Every type that a signature may have, in orders that need padding; addresses as numbers, tensors and None."""
    tensor = torch.zeros(3)
    values = {
        **{
            "i1": (True, False),
            "i8": (3, 127),
            "i16": (-32768, 77),
            "i32": (-(2**31), 12),
            "i64": (-(2**63), 1 << 40),
        },
        **{"u8": (255, 0), "u16": (65535, 0), "u32": (2**32 - 1, 0), "u64": (2**64 - 1, 0)},
        **{"fp16": (0.1, -65504.0), "bf16": (0.1, -3e38), "fp32": (0.1, float("inf")), "fp64": (0.1, -1e300)},
        **{"*fp32": (tensor, None), "*i8": (1 << 45, tensor[:0]), "constexpr": (3, print)},
    }
    rng = random.Random(0)
    for kind in values:
        others = rng.choices(list(values), k=6)
        signature = dict(zip("abcdefgh", [others[0], kind, *others[1:], kind], strict=True))
        for which in (0, 1):
            chosen = [values[each][which] for each in signature.values()]
            compare(cuda, drivers, signature, chosen, (2, 3), metadata_of(1, 0))


def compare_loading(cuda: RecordingCuda, drivers: list[GPUDriver]) -> None:
    """Little shared memory, more than 48 KB, all there is."""
    for shared_bytes in (0, 48 << 10, (48 << 10) + 16, OPTIN_SHARED_BYTES):
        logs, found = [], []
        for driver in drivers:
            cuda.log()
            found.append(tuple(driver.utils.load_binary("a_kernel", b"machine code", shared_bytes, 0)))
            logs.append(cuda.log())
        assert found[0] == found[1] and logs[0] == logs[1], (shared_bytes, found, logs)
        assert ("attribute 8" in logs[0]) == (shared_bytes > 48 << 10), logs[0]
    properties = [driver.utils.get_device_properties(0)["max_shared_mem"] for driver in drivers]
    assert properties == [OPTIN_SHARED_BYTES] * 2, properties


def compare_with_code(cuda: Cuda) -> None:
    """The parameters that compiled code declares: the trial kernel has every kind that ours have."""
    from kimi_lite.native.gpu.trial import _LARGE, _SCALE, _SMALL, _add

    x = torch.zeros(32)
    compiled = triton.jit(_add).run(x, x, _SMALL, _LARGE, _SCALE, 1, LANES=32, grid=(1,), warmup=True)
    declared = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", compiled.asm["ptx"])]
    assert declared == Parameters(cuda, list(compiled.src.signature.values())).sizes, declared


def main() -> None:
    cuda = build(Path(sys.argv[1]))
    drivers = [stand_in(CudaDriver(Cuda(cuda.library))), tritons_own()]
    compare_loading(cuda, drivers)
    compare_types(cuda, drivers)
    triton_driver.set_active(drivers[0])
    compare_with_code(drivers[0].cuda)
    kernels = Counter()
    for number, launch in enumerate(runtime_launches(tuple(BY_NAME))):
        compare_launch(cuda, drivers, launch, shared_bytes=1000 * (number % 100))
        kernels[launch.kernel.__name__] += 1
    assert "not aligned" not in cuda.log()
    print(f"triton {triton.__version__}: {sum(kernels.values())} launches alike: {dict(sorted(kernels.items()))}")


if __name__ == "__main__":
    main()
