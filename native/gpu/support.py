"""What the hybrid path needs and what a process lacks of it. Importable everywhere: torch and triton are imported on
demand.

    unusable = why_unusable(0)      # before a weight is read; None: kernels run
"""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

OLDEST_CAPABILITY = (8, 0)
OLDEST_DRIVERS = {11: "450", 12: "525", 13: "580"}  # NVIDIA's for Linux that serve all minor versions of a CUDA
_OWN_DRIVER_TRITONS = ((3, 5), (3, 9))  # whose questions to a driver `cuda_driver` answers: read and tested
_COMPILER_PACKAGES = {
    "debian": "sudo apt install gcc python3-dev",
    "fedora": "sudo dnf install gcc python3-devel",
    "arch": "sudo pacman -S gcc python",
    "suse": "sudo zypper install gcc python3-devel",
    "alpine": "sudo apk add gcc musl-dev python3-dev",
}


class Unusable(NamedTuple):
    """Why kernels cannot run here, and what to do; both are sentences."""

    problem: str
    remedy: str


def why_unusable(index: int = 0) -> Unusable | None:
    """None where kernels run on the CUDA device of this number, which a small one has just done.

    From then on the process launches kernels in the way that was found to work. The caller makes it an error.
    """
    if missing := _missing_package():
        return missing
    if is_interpreted():
        return None
    import torch

    if not torch.cuda.is_available():
        return _no_device()
    count = torch.cuda.device_count()
    if index >= count:
        return Unusable(
            f"There is no CUDA device {index}: torch sees {count}.",
            "nvidia-smi lists them; CUDA_VISIBLE_DEVICES hides those that it does not name.",
        )
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < OLDEST_CAPABILITY:
        return Unusable(
            f"The GPU has compute capability {major}.{minor}; the kernels need 8.0 (bfloat16 tensor cores).",
            "An RTX 30 or newer, an A or an H has it; --device cpu needs no GPU.",
        )
    return _try_drivers(index)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    from triton import knobs

    return knobs.runtime.interpret


def needs_compiler(triton_version: str) -> bool:
    """Whether kernels of this Triton are launched by its own driver, which it compiles from C."""
    lowest, highest = _OWN_DRIVER_TRITONS
    return not lowest <= tuple(int(part) for part in triton_version.split(".")[:2]) <= highest


def compiler_problem() -> Unusable | None:
    """None where a C compiler and Python's headers are here."""
    missing = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler (gcc or clang)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python's headers (Python.h)")
    if not missing:
        return None
    return Unusable(f"Triton compiles its driver from C; {' and '.join(missing)} is not here.", compiler_remedy())


def compiler_remedy(release: str | None = None) -> str:
    """The command that installs both. release: of /etc/os-release; None: this system's."""
    if release is None:
        release = "".join(path.read_text() for path in (Path("/etc/os-release"),) if path.exists())
    names = {key: value.strip('"') for key, _, value in (line.partition("=") for line in release.splitlines())}
    words = f"{names.get('ID', '')} {names.get('ID_LIKE', '')}".replace("ubuntu", "debian").split()
    words += ["fedora" for word in words if word in ("rhel", "centos")]
    words += ["suse" for word in words if "suse" in word]
    for word in words:
        if word in _COMPILER_PACKAGES:
            return f"Install them: {_COMPILER_PACKAGES[word]}."
    return "Install gcc and Python's headers, with your system's packages or conda install gcc_linux-64."


def driver_problem(cuda_of_torch: str, cuda_of_driver: str, driver: str = "") -> Unusable | None:
    """None where a driver that serves CUDA up to `cuda_of_driver` ("12.8") can run a torch built for `cuda_of_torch`.

    A driver runs what was built for its own major version of CUDA and for older ones, whatever the minor version.
    """
    built, served = (int(version.partition(".")[0] or 0) for version in (cuda_of_torch, cuda_of_driver))
    if not built or not served or built <= served:
        return None
    name = f"NVIDIA's driver {driver}".rstrip()
    problem = f"torch was built for CUDA {cuda_of_torch}; {name} serves CUDA {cuda_of_driver}."
    remedy = f"Install driver {OLDEST_DRIVERS[built]} or newer" if built in OLDEST_DRIVERS else "Install a newer driver"
    if served == 12:
        remedy += ", or pip install torch --index-url https://download.pytorch.org/whl/cu128"
    return Unusable(problem, f"{remedy}.")


def factor_type(dtype):
    """The Triton type in which `tl.dot` takes factors of this torch dtype.

    The interpreter multiplies bfloat16 as the integers that hold its bits. There the factors, rounded already, become
    float32: products of two bfloat16 are exact in it, as on tensor cores.
    """
    import torch
    import triton.language as tl

    if dtype == torch.float32 or is_interpreted():
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _missing_package() -> Unusable | None:
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is not None:
            continue
        problem = f"The GPU kernels need the package {name!r}, which is not installed."
        if name == "triton" and sys.platform != "linux":
            where = "inside WSL2" if platform.system() == "Windows" else "on Linux"
            return Unusable(f"{problem} It exists on Linux alone.", f"Run kimi-lite {where}.")
        return Unusable(problem, f"pip install {name}.")
    return None


def _no_device() -> Unusable:
    """torch sees nothing that it can use: it was built without CUDA, the driver is too old, or there is no GPU."""
    import torch

    if torch.version.cuda is None:
        where = " In Windows PyPI's torch is one: run kimi-lite inside WSL2." if platform.system() == "Windows" else ""
        return Unusable(
            f"No CUDA device is usable: torch {torch.__version__} was built without CUDA.",
            f"pip install --force-reinstall torch, without the CPU index.{where}",
        )
    if problem := driver_problem(torch.version.cuda, _cuda_of_driver()):
        return problem
    return Unusable(
        f"No CUDA device is usable: torch {torch.__version__} was built for CUDA {torch.version.cuda} and sees "
        f"{torch.cuda.device_count()} devices.",
        "nvidia-smi tells whether the driver works; in a container pass the GPU into it.",
    )


def _cuda_of_driver() -> str:
    """The newest CUDA that the driver serves, "12.8"; empty where there is no driver."""
    import ctypes

    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _try_drivers(index: int) -> Unusable | None:
    """Our way of launching kernels and Triton's, whichever works first: ours needs no compiler, Triton's knows the
    Tritons that we do not."""
    import warnings

    import torch
    import triton

    from kimi_lite.native.gpu import cuda_driver
    from kimi_lite.native.gpu.trial import try_a_kernel

    compiler = compiler_problem()
    own, tritons = ("kimi-lite's", cuda_driver.install), ("Triton's", cuda_driver.uninstall)
    ways: list[tuple[str, Callable[[], None]]] = [own] if compiler else [own, tritons]
    if needs_compiler(triton.__version__):
        ways.reverse()
    failures = []
    for name, install in ways:
        try:
            install()
        except Exception as error:
            failures.append(f"{name} launcher: {error}")
            continue
        with torch.cuda.device(index):
            failure = try_a_kernel(torch.device("cuda", index))
        if failure is None:
            if failures:
                warnings.warn(f"Kernels are launched by {name} driver: {failures[0]}", RuntimeWarning, stacklevel=2)
            return None
        failures.append(f"{name} launcher: {failure}")
    problem = f"A small kernel does not run on the GPU ({'; '.join(failures)})."
    remedy = "kimi-lite doctor tells more; --device cpu needs no GPU."
    return Unusable(f"{problem} {compiler.problem}", compiler.remedy) if compiler else Unusable(problem, remedy)
