"""What the hybrid path needs and what a process lacks of it. Importable everywhere: torch and triton are imported on
demand."""

import importlib.util


def why_unusable() -> str | None:
    """None where the kernels can run, else a sentence that says what is missing. The caller makes it an error with a
    remedy."""
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"The GPU kernels need the package {name!r}, which is not installed (triton exists on Linux alone)."
    if is_interpreted():
        return None
    import torch

    if not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        return (
            f"No CUDA device is usable: torch {torch.__version__} {built} and sees {torch.cuda.device_count()} devices."
        )
    major, minor = torch.cuda.get_device_capability()
    return (
        None
        if major >= 8
        else f"The GPU has compute capability {major}.{minor}; the kernels need 8.0 (bfloat16 tensor cores)."
    )


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    from triton import knobs

    return knobs.runtime.interpret


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
