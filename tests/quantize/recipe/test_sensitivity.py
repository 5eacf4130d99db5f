"""Tables of sensitivities: the one of Kimi K2.5, those of others, and what is no table."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.known import K2_5, KNOWN
from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.recipe.sensitivity import (
    Sensitivity,
    Unit,
    is_sensitivity,
    known_sensitivity,
    read_sensitivity,
    write_sensitivity,
)

HEADER = "tensor,type,error,floor,kl\n"


def experts_in(sensitivity: Sensitivity, first: int, last: int) -> list[Unit]:
    return [
        unit
        for unit in sensitivity.units
        if "_exps" in unit.tensors[0] and first <= int(unit.tensors[0].split(".")[1]) <= last
    ]


def test_kimi_is_known_by_its_dimensions():
    """The published sums of its source, and every matrix of the model."""
    known = known_sensitivity(K2_5)
    early, late = (sum(unit.kl for unit in experts_in(known, *layers)) for layers in ((1, 10), (51, 60)))
    assert early == pytest.approx(0.1185, abs=2e-4) and late == pytest.approx(0.0375, abs=2e-4)
    by_name = {unit.tensors[0]: unit for unit in known.units}
    assert by_name["output.weight"].kl == pytest.approx(0.048, abs=1e-4)
    matrices = {name for name in tensor_shapes(K2_5) if not name.endswith(("norm.weight", "bias", "gate_inp.weight"))}
    assert set(by_name) == matrices
    assert known_sensitivity(replace(K2_5, name="Kimi K2.6")) is known
    assert known_sensitivity(KNOWN["moonlight"].config) is None


def test_what_any_change_costs_is_not_counted_for_a_type():
    """attn_k_b was changed 27 times less than the others of its layer: what it costs falls from layer to layer, and is
    near to all that the first layers' experts cost."""
    known = known_sensitivity(K2_5)
    floors = [experts_in(known, layer, layer)[0].floor for layer in range(1, 61)]
    assert floors[0] == pytest.approx(0.003142) and floors[-1] == pytest.approx(4e-5)
    assert sum(a < b for a, b in itertools.pairwise(floors)) <= 3
    first, last = (sum(unit.slope for unit in experts_in(known, layer, layer)) for layer in (1, 60))
    assert first < last  # though its divergence is three times as large
    assert known.floor == pytest.approx(0.003262)


NAMES = st.text("abc._0123456789", min_size=1, max_size=12)
NUMBERS = st.floats(1e-9, 1e3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3), NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=6))
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    units = [
        Unit(tuple(f"t{i}.{j}.{name}" for j, name in enumerate(names)), "tq1_0", *numbers)
        for i, (names, *numbers) in enumerate(rows)
    ]
    write_sensitivity(path, units, ["a remark, with a comma", "another"])
    found = read_sensitivity(path).units
    assert [unit.tensors for unit in found] == [unit.tensors for unit in units]
    for ours, theirs in zip(found, units, strict=True):
        assert (ours.error, ours.floor, ours.kl) == pytest.approx((theirs.error, theirs.floor, theirs.kl), rel=1e-3)
    assert is_sensitivity(path)


def test_tables_of_the_suite_are_read(tmp_path):
    path = tmp_path / "kld_results.csv"
    path.write_text("QTYPE,blk.1.ffn_up_exps.weight,output.weight\niq1_kt,0.004,0.048\n")
    units = read_sensitivity(path).units
    assert [(unit.tensors, unit.type, unit.floor, unit.kl) for unit in units] == [
        (("blk.1.ffn_up_exps.weight",), "iq1_kt", 0, 0.004),
        (("output.weight",), "iq1_kt", 0, 0.048),
    ]
    assert units[0].error == pytest.approx(0.15, abs=0.01) and is_sensitivity(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("# only a remark\n", "is empty"),
        ("a,b\n1,2\n", "does not begin with tensor,type,error,floor,kl or QTYPE"),
        (HEADER, "has no tensor"),
        (HEADER + "a,q2_0,0.1,0,0.2\na,q2_0,0.1,0,0.3\n", "has a twice"),
        (HEADER + "a+b,q2_0,0.1,0,0.2\nb,q2_0,0.1,0,0.3\n", "has b twice"),
        (HEADER + "a,q2_0,0.1,0\n", "line 2: tensor,type,error,floor,kl is needed"),
        (HEADER + "a,q2_0,0,0,0.2\n", "line 2: error 0, floor 0, kl 0.2"),
        (HEADER + "a,q2_0,0.1,-1,0.2\n", "floor -1"),
        (HEADER + "a,q2_0,0.1,0,nan\n", "kl nan"),
        (HEADER + "a,q2_0,0.1,0,much\n", "is needed"),
        (HEADER + "a+,q2_0,0.1,0,0.2\n", "line 2"),
        ("QTYPE,a\n", "has 0 rows"),
        ("QTYPE,a\niq1_kt,0.1\niq2_kt,0.1\n", "has 2 rows"),
        ("QTYPE,a,b\niq1_kt,0.1\n", "has 2 cells under 3 names"),
        ("QTYPE,a\nnothing,0.1\n", "There is no type 'nothing'"),
        (HEADER + "a" * (1 << 18) + ",q2_0,0.1,0,0.2\n", "is no table"),
        (HEADER + '"' + "a\n" * (1 << 17), "is needed"),
    ],
)
def test_what_is_no_table(tmp_path, content, said):
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(KimiLiteError) as caught:
        read_sensitivity(path)
    assert said in caught.value.message and caught.value.hint


@pytest.mark.parametrize("content", ["blk=q8_0\n", "# tensor,\n^a$=q2_0\n", ""])
def test_a_recipe_is_no_table(tmp_path, content):
    (tmp_path / "r.recipe").write_text(content)
    assert not is_sensitivity(tmp_path / "r.recipe")
