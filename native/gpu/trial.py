"""One small kernel, compiled, launched and looked at: whether this process can run any, before a weight is read.

Its arguments are of every kind that our kernels have, pinned memory of the host among them, so that a launcher that
passes one wrongly is found here too.
"""

from contextlib import suppress

import torch
import triton
import triton.language as tl

_LANES = 32
_SMALL, _LARGE, _SCALE = 7, (5 << 40) + 3, 0.375  # int32, int64, float32


def _add(x, out, small, large, scale, one, LANES: tl.constexpr):
    """out[i] = x[i] * scale + small + large / 2^40 + one."""
    lane = tl.arange(0, LANES)
    high = (large >> 40).to(tl.float32)
    tl.store(out + lane, tl.load(x + lane) * scale + small + high + one)


def try_a_kernel(device: torch.device) -> str | None:
    """None where a kernel gives what it should on this device, else what went wrong, in one line.

    The kernel is made anew, so that a second try after another driver was installed is a try of that driver.
    """
    try:
        x = torch.arange(_LANES, dtype=torch.float32, device=device)
        have = torch.zeros(_LANES, pin_memory=device.type == "cuda")  # to which kernels of a decode step write, too
        triton.jit(_add)[(1,)](x, have, _SMALL, _LARGE, _SCALE, 1, LANES=_LANES)
        want = torch.arange(_LANES, dtype=torch.float32) * _SCALE + _SMALL + (_LARGE >> 40) + 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # a compiler, a driver, a missing program: each has its own
        return _in_one_line(error)
    return None if torch.equal(have, want) else f"a kernel gave {have[1]:g} instead of {want[1]:g}"


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    with suppress(IndexError):
        return f"{type(error).__name__}: {lines[0][:300]}"
    return type(error).__name__
