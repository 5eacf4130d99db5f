"""Options: each declared once, every value of every kind from every source, and either an effect or a line."""

import os
from dataclasses import fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.commandline.flags import resolve
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.planning import situation_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.machine import Gpu, described
from kimi_lite.hardware.probe import probe
from kimi_lite.options import OPTIONS, PROMPT, SAMPLING, Options, Situation, options_of, unused_options
from kimi_lite.plan.plan import make_plan
from kimi_lite.units import GIB, MIB
from tests.tiny import write_tiny_gguf

COMMANDS = ("chat", "run", "bench", "plan", "imatrix", "swarm")
GOOD = {  # what may be typed for a kind, and what it is
    "text": ("abc", "abc"),
    "path": ("~/abc", Path("~/abc").expanduser()),
    "integer": ("3", 3),
    "number": ("0.5", 0.5),
    "size": ("3G", 3 << 30),
    "sizes": ("3G", 3 << 30),
    "tokens": ("2K", 2048),
}
BAD = {
    "integer": ["x", "1.5", ""],
    "number": ["x", "nan", "inf"],
    "size": ["x", "24", "-1G"],
    "sizes": ["x", "24", "-1G"],
    "tokens": ["abc", "-5", "1.5"],
    "choice": ["x", ""],
    "switch": ["maybe"],
}


@pytest.fixture(autouse=True)
def _own_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_LITE_CONFIG", str(tmp_path / "config.toml"))
    for name in [name for name in os.environ if name.startswith("KIMI_LITE_") and name != "KIMI_LITE_CONFIG"]:
        monkeypatch.delenv(name)


def good(option) -> tuple[object, object]:
    if option.kind == "choice":
        return option.choices[-1], option.choices[-1]
    if option.kind == "switch":
        return True, True
    if option.kind == "texts":
        return ["a"], ("a",)
    return GOOD[option.kind]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_comes_from_flag_variable_and_file_in_this_order(name, monkeypatch):
    option = OPTIONS[name]
    command = option.commands[0]
    written, value = good(option)
    value = option.convert(value) if option.convert else value
    options = resolve(command, {name: written})
    assert getattr(options, name) == value and list(options.given) == [name]
    text = {True: "true", False: "false"}[written] if isinstance(written, bool) else repr(written).replace("'", '"')
    Path(os.environ["KIMI_LITE_CONFIG"]).write_text(f"\n{option.key} = {text}\n")
    if not option.is_setting:
        with pytest.raises(KimiLiteError, match="only be given on the command line"):
            resolve(command, {})
        return
    found = resolve(command, {})
    assert getattr(found, name) == value and "(line 2)" in found.given[name]
    monkeypatch.setenv(option.variable, " ".join(written) if isinstance(written, list) else str(written))
    found = resolve(command, {})
    assert getattr(found, name) == value and found.given[name] == option.variable
    assert resolve(command, {name: written}).given[name] == option.long_flag


@pytest.mark.parametrize("name", [n for n, option in OPTIONS.items() if option.kind in BAD and option.is_setting])
def test_a_bad_value_says_where_it_came_from(name, monkeypatch):
    option = OPTIONS[name]
    for bad in BAD[option.kind]:
        if not isinstance(bad, bool) and option.kind != "switch":
            with pytest.raises(KimiLiteError, match=option.long_flag):
                resolve(option.commands[0], {name: bad})
        if bad:
            monkeypatch.setenv(option.variable, bad)
            with pytest.raises(KimiLiteError, match=option.variable):
                resolve(option.commands[0], {})
            monkeypatch.delenv(option.variable)
        Path(os.environ["KIMI_LITE_CONFIG"]).write_text(f'# mine\n{option.key} = "{bad}"\n')
        with pytest.raises(KimiLiteError, match=rf"{option.key} in .*config\.toml \(line 2\)"):
            resolve(option.commands[0], {})
        Path(os.environ["KIMI_LITE_CONFIG"]).unlink()


@pytest.mark.parametrize(
    "name", [name for name in OPTIONS if OPTIONS[name].kind != "texts" and OPTIONS[name].is_setting]
)
def test_a_list_is_no_value_of_one_thing(name):
    Path(os.environ["KIMI_LITE_CONFIG"]).write_text(f'{OPTIONS[name].key} = ["a"]')
    with pytest.raises(KimiLiteError, match=OPTIONS[name].key):
        resolve(OPTIONS[name].commands[0], {})


@settings(deadline=None)
@given(st.sampled_from(list(OPTIONS)), st.text(max_size=12))
def test_any_text_is_a_value_or_a_sentence(name, text):
    option = OPTIONS[name]
    try:
        value = option.parse(text, "here")
    except KimiLiteError as error:
        value, said = None, error.message
        assert said.startswith("here is ")
    if value is not None and option.kind in ("integer", "number", "tokens", "size"):
        assert option.least is None or value >= option.least
        assert option.most is None or value <= option.most


@settings(deadline=None)
@given(st.sampled_from([n for n, each in OPTIONS.items() if each.panel in (SAMPLING, PROMPT)]), st.floats(-3, 3))
def test_what_an_option_takes_the_sampler_takes(name, number):
    """No value gets past the option to be refused later, without its flag's name."""
    option = OPTIONS[name]
    text = str(round(number) if option.kind in ("integer", "tokens") else number)
    try:
        options = Options(**{name: option.parse(text, "here")})
    except KimiLiteError:
        return
    AnswerSettings.from_options(options)  # raises where it does not


def test_the_file_serves_every_command_that_has_the_option():
    Path(os.environ["KIMI_LITE_CONFIG"]).write_text('model = "mine"\nthreads = 3\nctx = "2K"\ntemp = 0.5\n')
    for command in COMMANDS:
        names = {option.name for option in options_of(command)}
        options = resolve(command, {})
        assert (options.model, options.num_threads) == ("mine", 3)
        assert (options.context_length == 2048) == ("context_length" in names)
        assert (options.temperature == 0.5) == ("temperature" in names)


def test_flags_variables_and_keys_are_unique():
    for command in COMMANDS:
        flags = [flag for option in options_of(command) for side in option.flags for flag in side.split("/")]
        assert len(flags) == len(set(flags))
        assert len({option.variable for option in options_of(command)}) == len(options_of(command))


def test_defaults_are_values_of_their_options():
    for name, option in OPTIONS.items():
        default = next(each.default for each in fields(Options) if each.name == name)
        if default is not None and option.kind not in ("texts", "switch"):
            assert option.parse(str(default), name) == default
        if option.shown_default:
            assert option.shown_default == "on" or option.parse(option.shown_default, name) == default


SITUATIONS = [
    Situation(**dict(zip((each.name for each in fields(Situation)), values, strict=True)))
    for values in product((False, True), repeat=len(fields(Situation)))
]


def given_flags(**values: object) -> Options:
    return Options(**values, given={name: OPTIONS[name].long_flag for name in values})


@pytest.mark.parametrize("situation", [s for s in SITUATIONS if s.is_endpoint][:8])
def test_an_endpoint_takes_nothing_that_is_local(situation):
    local = {
        "num_threads": 2,
        "kv_dtype": "q8",
        "vram_bytes": GIB,
        "ram_bytes": GIB,
        "loading": "read",
        "device": "cpu",
    }
    local |= {"context_length": 512, "num_gpu_experts": 1, "dense_type": "bf16", "cache_bias": 0.1, "is_warm": True}
    local |= {"numa": "off", "prefix_bytes": GIB, "prefix_folder": Path("x"), "routing_trace": Path("y")}
    assert len(unused_options(given_flags(**local), situation)) == len(local)
    assert unused_options(given_flags(api_key="x", top_k=3, max_tokens=3), situation) == []


def test_what_a_default_says_is_no_line():
    assert unused_options(Options(api_key="x", given={"api_key": "KIMI_LITE_API_KEY"}), Situation()) == []
    assert unused_options(given_flags(api_key="x"), Situation()) == [
        "--api-key has no effect here: it is for --endpoint."
    ]


def test_sampling_and_display():
    greedy = given_flags(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1, seed=4, repetition_penalty=1.1)
    assert [line.split()[0] for line in unused_options(greedy, Situation())] == [
        "--top-k",
        "--top-p",
        "--min-p",
        "--seed",
    ]
    shown = given_flags(is_plain=True, is_hiding_thinking=True, thinking_budget=5)
    assert unused_options(shown, Situation()) == []
    assert len(unused_options(shown, Situation(is_terminal=False))) == 2
    assert len(unused_options(shown, Situation(can_think=False))) == 2


@lru_cache
def model(folder: Path):
    store = GGUFStore.open(write_tiny_gguf(folder / "tiny.gguf", np.random.default_rng(0), num_experts=32))
    config = ModelConfig.from_metadata(store.metadata)
    return store_sizes(store, config), probe(folder)


VALUES = {
    "context_length": 512,
    "kv_dtype": "q8",
    "num_threads": 3,
    "device": "cpu",
    "vram_bytes": 4 * GIB,
    "ram_bytes": 3 * GIB,
    "num_gpu_experts": 2,
    "dense_type": "bf16",
    "loading": "read",
    "cache_bias": 0.5,
}
CASES = [*VALUES.items(), ("loading", "lock"), ("vram_bytes", 0), ("num_gpu_experts", 0)]


def effect(options: Options, hardware, sizes) -> object:
    """What is laid out and loaded with these options: nothing else of them is used."""
    plan = make_plan(sizes, hardware, options)
    has_slots = plan.ram_expert_bytes and (plan.disk_expert_bytes or options.loading != "map")  # see `open_ram`
    ram_slots = (plan.ram_budget_bytes, options.loading == "lock") if has_slots else None
    is_split = 0 < plan.num_vram_slots < sizes.num_experts if plan.is_on_gpu else plan.disk_expert_bytes > 0
    prefers = options.cache_bias if is_split else 0.0
    parts = tuple((row.place, row.part, row.num_bytes) for row in plan.rows)
    return parts, plan.budgets, plan.context_length, plan.num_threads, plan.num_vram_slots, ram_slots, prefers


@pytest.mark.parametrize(("name", "value"), CASES)
@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("is_from_disk", [False, True])
@pytest.mark.parametrize("loading", ["map", "lock"])
def test_every_option_has_an_effect_or_a_line(name, value, has_gpu, is_from_disk, loading, tmp_path_factory):
    sizes, here = model(tmp_path_factory.getbasetemp())
    gpu = Gpu("a GPU", 24 * GIB, 23 * GIB, 900e9, 23e9) if has_gpu else None
    hardware = replace(described(here, 16 * GIB, None, num_cores=8), gpu=gpu)
    base = Options(loading=loading, ram_expert_bytes=2 * MIB if is_from_disk else None, num_gpu_experts=4)
    base = replace(base, **{name: getattr(Options(), name)})
    with_it = replace(base, **{name: value}, given={name: OPTIONS[name].long_flag})
    situation = situation_of(make_plan(sizes, hardware, with_it), with_it)
    changes = effect(with_it, hardware, sizes) != effect(base, hardware, sizes)
    lines = unused_options(with_it, situation)
    if not has_gpu and (name, value) in (("device", "cpu"), ("vram_bytes", 0)):
        return  # asks for what is so
    assert changes or lines, (name, situation)
    assert not (changes and lines), (lines, situation)


@pytest.mark.parametrize("num_sockets", [1, 2])
@pytest.mark.parametrize("num_threads", [1, None])
def test_numa_has_an_effect_where_threads_run_on_several_nodes(num_sockets, num_threads, tmp_path_factory):
    sizes, here = model(tmp_path_factory.getbasetemp())
    hardware = described(here, 64 * GIB, 0, num_sockets=num_sockets)
    off = replace(given_flags(numa="off"), num_threads=num_threads)
    plans = [make_plan(sizes, hardware, replace(off, numa=numa)) for numa in ("auto", "off")]
    lines = unused_options(off, situation_of(plans[1], off))
    assert (plans[0].rates != plans[1].rates) == (not lines) == (num_sockets == 2 and num_threads is None)
    assert all("memory node" in line for line in lines)


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("is_reproducible", [False, True])
def test_reproducible_answers_one_request_at_a_time(has_gpu, is_reproducible, tmp_path_factory):
    """On a GPU, and then the cache has no memory for more either, which --parallel is told."""
    sizes, here = model(tmp_path_factory.getbasetemp())
    gpu = Gpu("a GPU", 24 * GIB, 23 * GIB, 900e9, 23e9) if has_gpu else None
    hardware = replace(described(here, 16 * GIB, None, num_cores=8), gpu=gpu)
    one, four = (
        make_plan(sizes, hardware, Options(num_sequences=count, is_reproducible=is_reproducible)) for count in (1, 4)
    )
    is_one_by_one = has_gpu and is_reproducible
    assert four.situation.num_running == (1 if is_one_by_one else 4)
    assert four.num_cache_pages == one.num_cache_pages * four.situation.num_running
    given = replace(four.limits, given={"num_sequences": "--parallel"})
    assert bool(unused_options(given, situation_of(four, given))) == is_one_by_one
