"""The encoders with error feedback on eight threads, in a process whose allocator overwrites what is freed and hands it
out again at once: a kernel that works in memory of others crashes or gives other bytes there.

`.ci/run` runs all tests with this allocator; this one also runs without.
"""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.codecs.feedback import CODE_TYPES, Curvature, encode_with_feedback

ROOT = Path(__file__).parents[3]
NUM_THREADS, NUM_JOBS, K = 8, 24, 512
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_PERTURB_": "165"}


def encode(seed: int) -> str:
    """The hash of a small matrix's bytes in every type whose codes feedback chooses."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((200, K)).astype(np.float32)
    rows = rng.standard_normal((32, K)).astype(np.float32)
    curvature = Curvature.of(inputs.T @ inputs, len(inputs))
    encoded = [encode_with_feedback(BY_NAME[name], rows, curvature) for name in sorted(CODE_TYPES)]
    return hashlib.blake2b(b"".join(each.tobytes() for each in encoded), digest_size=8).hexdigest()


def digests(num_threads: int) -> list[str]:
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(encode, range(NUM_JOBS)))


@pytest.mark.skipif(sys.platform != "linux", reason="these are settings of glibc's allocator")
def test_many_threads_with_an_allocator_that_overwrites():
    environment = {**os.environ, **ENVIRONMENT, "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", __name__], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
    assert run.stdout.split() == digests(1)


if __name__ == "__main__":
    print(*digests(NUM_THREADS))
