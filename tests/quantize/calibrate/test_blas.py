"""How many threads products of matrices take while a model is converted."""

import numpy as np
from threadpoolctl import threadpool_info

from kimi_lite.hardware.host import usable_cores
from kimi_lite.quantize.calibrate import blas
from kimi_lite.quantize.convert import convert
from tests.tiny import write_tiny_gguf


def threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_one_for_all_and_all_for_one():
    before = threads()
    with blas.one_thread():
        assert threads() == {1}
        with blas.all_threads():
            assert threads() == {usable_cores().most_threads}
        assert threads() == {1}
    assert threads() == before


def test_the_encoders_threads_take_one_each(tmp_path):
    before, during = threads(), []
    source = write_tiny_gguf(tmp_path / "m.gguf", np.random.default_rng(0), num_layers=1)
    convert(source, tmp_path / "out.gguf", "q8_0", lambda name, done, total: during.append(threads()))
    assert during and all(found == {1} for found in during)
    assert threads() == before
