"""Files that the program keeps for itself: whatever is wrong with them costs a line, never the run."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.heat import load_heat, save_heat
from kimi_lite.experts.recorder import RoutingTrace, read_trace, write_trace

SHAPE = (2, 3, 40)
ANY_FOLDER = settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)


def damaged(whole: bytes, changes: list[tuple[float, int]], kept: float) -> bytes:
    """Some bytes changed, and cut where less than all is kept."""
    data = bytearray(whole)
    for share, value in changes:
        data[int(share * len(data))] = value
    return bytes(data[: int(kept * len(data))]) if kept < 1 else bytes(data)


@ANY_FOLDER
@given(changes=CHANGES, kept=st.floats(0, 2))
def test_damaged_heat_is_a_warning(tmp_path: Path, changes: list[tuple[float, int]], kept: float) -> None:
    path, heat = tmp_path / "m.heat.npz", np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    assert save_heat(path, heat)
    path.write_bytes(damaged(path.read_bytes(), changes, kept))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = load_heat(path, SHAPE)
    assert found is None or found.shape == SHAPE
    assert len(said) <= 1
    assert all("is damaged; it starts empty" in str(one.message) for one in said)


def test_missing_heat_is_silent_and_cut_heat_is_not(tmp_path: Path) -> None:
    path = tmp_path / "m.heat.npz"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_heat(path, SHAPE) is None
    save_heat(path, np.ones(SHAPE, np.float32))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged"):
        assert load_heat(path, SHAPE) is None


@ANY_FOLDER
@given(changes=CHANGES, kept=st.floats(0, 2))
def test_a_damaged_record_of_routing_is_a_sentence(
    tmp_path: Path, changes: list[tuple[float, int]], kept: float
) -> None:
    path = tmp_path / "r.npz"
    ids = np.random.default_rng(0).integers(0, 8, (50, 3, 2)).astype(np.int16)
    trace = RoutingTrace(ids=ids, starts=np.array([0, 50], np.int64), num_experts=8, name="m")
    write_trace(path, trace)
    path.write_bytes(damaged(path.read_bytes(), changes, kept))
    try:
        read_trace(path)
    except KimiLiteError as error:
        said = str(error)
    else:
        said = ""
    assert "Errno" not in said
