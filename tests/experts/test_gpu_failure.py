"""Errors of a GPU as sentences: each kind is told apart, and what is not the GPU's stays as it is."""

import pytest
import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_failure import GpuBroken, GpuMemoryEnded, told
from kimi_lite.experts.gpu_streams import GpuStreams

MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
BROKEN = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nFor debugging ..."),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("CUDA driver error: unknown error"),
]


@pytest.mark.parametrize("error", MEMORY + BROKEN, ids=lambda error: str(error)[:40])
def test_each_kind_is_a_sentence(error):
    kind = GpuMemoryEnded if error in MEMORY else GpuBroken
    with pytest.raises(kind) as caught, told("in a pass over 3 tokens", "Allow less."):
        raise error
    message = caught.value.message
    assert "in a pass over 3 tokens: " in message and str(error).splitlines()[0] in message and "\n" not in message
    assert caught.value.__cause__ is error and caught.value.hint
    assert (caught.value.hint == "Allow less.") == (kind is GpuMemoryEnded)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KimiLiteError, OSError, KeyboardInterrupt])
def test_other_errors_stay_as_they_are(kind):
    error = kind("The size of tensor a (3) must match the size of tensor b (4)")
    with pytest.raises(kind) as caught, told("here", "Nothing."):
        raise error
    assert caught.value is error


def test_memory_that_cannot_be_pinned_is_a_sentence(monkeypatch):
    streams = GpuStreams("cpu")

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "zeros", refuse)
    error = torch.AcceleratorError("CUDA error: out of memory")
    with pytest.raises(GpuMemoryEnded, match=r"no pinned memory for 64\.0 MiB: CUDA error: out of memory"):
        streams.pinned((16, 1 << 20), torch.float32)
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError, match="illegal"):  # no matter of pinning: `told` says what it is
        streams.pinned((16,), torch.float32)
