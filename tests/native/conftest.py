"""Which types stand for others in this folder's tests of every type. KIMI_LITE_TEST_TYPES=all leaves none out."""

import os
from pathlib import Path

import pytest

from kimi_lite.native.layouts import BY_NAME
from tests.native.path_check import IK_SAMPLE

_OTHERS = {name for name, layout in BY_NAME.items() if layout.is_ik} - IK_SAMPLE
_ALL = ("types", "test_exact.py")  # decoders, and products by the rule, bit for bit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("KIMI_LITE_TEST_TYPES") == "all":
        return
    here = Path(__file__).parent
    left_out = [item for item in items if here in item.path.parents and _is_of_another(item, here)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _is_of_another(item: pytest.Item, here: Path) -> bool:
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    names = {value for value in item.callspec.params.values() if isinstance(value, str)}
    return bool(names & _OTHERS) and item.path.relative_to(here).parts[0] not in _ALL
