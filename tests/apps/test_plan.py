"""`kimi-lite plan`: tables of every width, JSON, refusals with exit code 2 and remedies that run, every way to name a
model."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.arch.recipe import named_recipe
from kimi_lite.arch.sizes import sizes_of
from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.cli import app
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware import probe as hardware
from kimi_lite.hardware.machine import Disk, Hardware, described, free_of
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.quality import loss_order, quality_of
from kimi_lite.plan.subject import RECIPES, best_choice, choices, find_subject
from kimi_lite.plan.types import KV
from kimi_lite.plan.view import next_line, plan_lines, start_panel, verdict_line
from kimi_lite.plan.workspace import vision_work_bytes
from kimi_lite.quantize.recipe.choose import with_overrides
from kimi_lite.tools.make.vision import K2_5_TOWER, write_tower
from kimi_lite.units import GIB
from tests.tiny import write_tiny_gguf

_KIMI_CONFIG = Path(__file__).parents[3] / "shared/data/kimi-tokenizer/config.json"
HERE = Hardware("a CPU", 8, "avx2", 32 * GIB, free_of(32 * GIB), disk=Disk(Path("/models"), 100 * GIB), clock_hz=4e9)


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """The same machine every time."""
    monkeypatch.setattr(hardware, "probe", lambda path=None, is_measuring=False, gpu_indices=(0,): HERE)
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))


def run(*arguments):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, (KimiLiteError, SystemExit)), result.exception
    return result


def on_desktop(*arguments):
    return run("--vram", "24G", "--ram", "256G", *arguments)


def test_the_issue_s_own_call():
    result = run("--model", "kimi-k2.5", "--recipe", "tq1_0", "--vram", "24G", "--ram", "256G", "-c", "32K")
    text = result.stdout
    assert result.exit_code == 0
    assert all(len(line) <= 80 for line in text.splitlines()), max(text.splitlines(), key=len)
    for part in (
        "hypothetical: 16-core desktop (assumed)",
        "dense weights",
        "KV cache",
        "32,768 tokens in f16",
        "vision",
        "cached experts",
        "of 23,040 experts",
    ):
        assert part in text
    assert "reads 4.46 GB of experts from RAM" in text and "* assumed" in text and "Verdict   fits" in text


def test_json_is_one_document():
    document = json.loads(on_desktop("--recipe", "tq1_0", "--json").stdout)
    assert document["recipe"] == "tq1_0" and document["verdict"] == "fits" and document["recipes"] == []
    assert document["num_vram_slots"] > 500 and document["hardware"]["ram_total_bytes"] == 256 * GIB


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        (("--vram", "24G", "--ram", "256G"), "iq2_xxs"),  # loses least of those that RAM and VRAM hold together
        (("--vram", "0", "--ram", "512G"), "q3_k"),
        (("--vram", "24G", "--ram", "768G"), "q4_0-lossless"),
        (("--vram", "24G", "--ram", "64G"), "iq1_s"),  # nothing fits: the smallest reads least from disk
        (("-m", "moonlight", "--vram", "8G", "--ram", "16G"), "q8_0"),
        (("-m", "moonlight"), "q8_0"),
    ],
)
def test_without_a_recipe_the_best_that_fits_is_planned(arguments, recipe):
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["recipe"] == recipe
    whole = [other["recipe"] for other in document["recipes"] if other["verdict"] in ("fits", "tight")]
    losses = [loss_order(name, 1.0) for name in whole]
    assert recipe == "iq1_s" or loss_order(recipe, 1.0) <= min(losses) or quality_of(recipe).kl_nats is None


def test_the_table_says_why_and_what_it_needs():
    text = on_desktop().stdout
    assert re.search(r"^\* iq2_xxs\+ +0.991 .* tight ", text, re.M) and "least loss of quality" in text
    assert "kimi-lite[ggml]" in text and "importance matrix" in text
    assert "loses less" not in text  # nothing calibrated was measured to, on text of another kind
    assert "needs pip install" not in run("-m", "moonlight", "--json").stdout
    named = on_desktop("--recipe", "q4_k").stdout
    assert re.search(r"^\* q4_k\+ ", named, re.M) and "* named: planned above" in named


WIDTHS = (40, 60, 80, 100, 200)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--vram", "24G", "--ram", "256G"),
        ("--vram", "12G", "--ram", "128G"),
        ("--ram", "15G"),
        ("-m", "moonlight", "--recipe", "q4_0", "--ram", "20G", "-t", "64"),
        ("-m", "deepseek-v3", "--vram", "24G", "--ram", "64G", "-c", "64K", "--kv-dtype", "q8"),
    ],
)
def test_every_width_is_kept_and_no_word_is_broken(monkeypatch, width, arguments):
    """Lines end between words; a word that is longer than a line alone is one."""
    monkeypatch.setenv("COLUMNS", "1000")
    words = [*run(*arguments).stdout.split(), "\\"]
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run(*arguments).stdout.splitlines()
    known = {*words, *(word for line in lines for word in line.split() if len(word) > width)}
    for line in lines:
        assert len(line) <= width or " " not in line.strip(" \\"), line
        assert set(line.split()) <= known, line
    if width > 60:
        assert max(map(len, lines)) > 60


def test_a_pipe_has_80_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = on_desktop().stdout.splitlines()
    assert 70 < max(map(len, lines)) <= 80


def test_one_story_of_numbers():
    """What is expected and its limit, by these names and with the same digits wherever a plan speaks."""
    subject = find_subject("kimi-k2.5")
    other = described(HERE, 256 * GIB, 24 * GIB)
    plan = make_plan(subject.sizes_in("tq1_0"), other)
    expected, limit = f"{plan.decode.expected_tok_s:.1f}", f"{plan.decode.limit_tok_s:.1f}"
    for text in (plan_lines(plan), start_panel(plan), [verdict_line(plan)]):
        told = " ".join(" ".join(text).split())
        assert re.search(rf"expected {expected} tok(ens)?/s, limit {limit}", told), told
        assert "at most" not in told.replace("% at best", "") and "ceiling" not in told and "bound" not in told
    row = next(line for line in on_desktop().stdout.splitlines() if "tq1_0" in line)
    assert row.split()[-2:] == [expected, limit]


def test_a_refused_plan_has_no_speeds():
    result = run("--vram", "8G", "--ram", "128G", "--recipe", "tq1_0")
    above = result.stdout.partition("Types of the routed experts")[0]
    assert "it cannot run" in above and "tokens/s" not in above and "expected" not in above
    for row in json.loads(run("--vram", "8G", "--ram", "128G", "--json").stdout)["recipes"]:
        assert (row["verdict"] == "refused") == (row["decode"] is None) == (row["refusal"] is not None)


@pytest.mark.parametrize("ram", [None, "8G", "31G", "32G", "33G", "64G", "512G"])
def test_the_cpu_does_not_change_with_the_ram(ram):
    """Neither this machine's nor the assumed one; with --cores it is said which."""
    flags = ("--ram", ram) if ram else ()
    here, other, cores = (
        json.loads(run("-m", "moonlight", "--recipe", "q4_0", *flags, *more, "--json").stdout)
        for more in ((), ("--vram", "24G"), ("--cores", "6"))
    )
    assert (here["hardware"]["cpu_name"], here["num_threads"]) == ("a CPU", 8)
    assert here["rates"]["cpu_macs"]["per_s"] == 8 * 32 * 4e9
    assert (other["hardware"]["cpu_name"], other["num_threads"]) == ("16-core desktop (assumed)", 16)
    assert (cores["hardware"]["cpu_name"], cores["num_threads"]) == ("6-core desktop (assumed)", 6)
    text = run("-m", "moonlight", "--recipe", "q4_0", *flags, "--cores", "6").stdout
    assert "hypothetical: 6-core desktop (assumed)" in text
    larger = run("-m", "moonlight", "--recipe", "q4_0", *flags).stdout
    assert ("hypothetical: this one with more memory" in larger) == (ram in ("33G", "64G", "512G"))


REFUSED = [
    ("--vram", "8G", "--ram", "128G", "--recipe", "tq1_0"),
    ("--vram", "8G", "--ram", "128G", "--recipe", "q4_k"),
    ("--vram", "24G", "--ram", "256G", "-c", "0", "--recipe", "tq1_0"),
    ("--vram", "8G", "--ram", "16G", "--recipe", "tq1_0"),
    ("--vram", "24G", "--ram", "256G", "--gpu-experts", "20000", "--recipe", "iq1_s"),
    ("--vram", "24G", "--ram", "256G", "--dense", "bf16", "--recipe", "iq1_s"),
    ("-m", "moonlight", "-c", "100K", "--recipe", "q4_0"),
    ("-m", "deepseek-v3", "--ram", "9G", "--recipe", "q4_k"),
    ("--ram", "9G", "--cores", "4", "--recipe", "q2_k"),
    ("-m", "moonlight", "--device", "cuda", "--recipe", "q8_0"),
    ("-m", "moonlight", "--ram", "2G", "--recipe", "q8_0", "--kv-dtype", "f32"),
]


@pytest.mark.parametrize("arguments", REFUSED)
def test_remedies_work_as_they_are_typed(arguments):
    """And nothing that would run is refused in the same breath."""
    result = run(*arguments)
    refused = json.loads(run(*arguments, "--json").stdout)["refusal"]
    assert result.exception.hint == "\n".join(
        f"Try {remedy['flags'] or remedy['action']}: {remedy['effect']}." for remedy in refused["remedies"]
    )
    assert refused["remedies"]
    for remedy in refused["remedies"]:
        if remedy["flags"]:
            changed = [*arguments, *remedy["flags"].split()]
        elif "without" in remedy["action"]:
            flags = remedy["action"].removeprefix("without ").split(" and ")
            pairs = [arguments[i : i + 2] for i in range(0, len(arguments), 2)]
            changed = [word for pair in pairs for word in pair if pair[0] not in flags]
        elif "more memory" in remedy["action"]:
            ram = remedy["effect"].split()[0]
            changed = [*arguments, "--ram", f"{ram}G", *remedy["action"].partition(" and ")[2].split()]
        else:
            continue  # another disk
        again = run(*changed, "--json")
        assert json.loads(again.stdout)["verdict"] != "refused", (remedy, again.exception)
        assert again.exit_code == 0, (remedy, again.exception)
        if remedy["flags"]:
            tok_s = json.loads(again.stdout)["decode"]["expected_tok_s"]
            assert f"{tok_s:.1f} tokens/s expected" in remedy["effect"], remedy


def test_a_laptop_is_refused(monkeypatch):
    small = Hardware("a laptop", 4, "avx2", 16 * GIB, free_of(16 * GIB), clock_hz=3e9)
    monkeypatch.setattr(hardware, "probe", lambda *_: small)
    result = run("--recipe", "tq1_0")
    assert isinstance(result.exception, KimiLiteError), "cli.main makes exit code 2 of it"
    assert "GiB of RAM are needed" in result.exception.message and "32 GiB of RAM would do" in result.exception.hint
    assert "it cannot run" in result.stdout and "dense weights" in result.stdout, "the plan is shown all the same"
    document = json.loads(run("--recipe", "tq1_0", "--json").stdout)
    assert document["verdict"] == "refused" and document["refusal"]["remedies"]


def test_limits_do_not_describe_another_machine():
    text = run("-m", "moonlight", "--recipe", "q4_0", "--ram", "20G", "--vram", "0").stdout
    assert "hypothetical" not in text and "--ram allows 20.0 GiB" in text and "no GPU" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vram", "much"), "--vram is 'much'"),
        (("-m", "kimi-k9"), "no model known by name"),
        (("--recipe", "q9_z"), "There is no recipe 'q9_z'"),
        (("-m", "moonlight", "-c", "100K"), "made for 8,192"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(arguments, message):
    error = run(*arguments).exception
    assert isinstance(error, KimiLiteError) and message in str(error)


def test_speeds_can_be_given():
    slow, fast = (
        json.loads(on_desktop("--recipe", "tq1_0", "--ram-speed", speed, "--json").stdout) for speed in (40, 80)
    )
    assert slow["rates"]["ram"] == {"per_s": 40e9, "origin": "given"}
    assert slow["decode"]["expected_tok_s"] < fast["decode"]["expected_tok_s"]


def test_a_file_has_its_types(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), types={"_exps": "F16"})
    width = GGUFStore.open(path).metadata["deepseek2.embedding_length"]
    small = replace(K2_5_TOWER, hidden=64, feed_forward=96, heads=4, layers=1, text_hidden=width)
    write_tower(tmp_path / "mmproj-tiny.gguf", small)
    write_tower(tmp_path / "mmproj-of-another-model.gguf", replace(small, text_hidden=32))
    document = json.loads(run("-m", path, "--json").stdout)
    assert document["types"].startswith("F16 experts") and document["verdict"] == "fits"
    rows = {(row["place"], row["part"]): row["num_bytes"] for row in document["rows"]}
    weights = GGUFStore.open(tmp_path / "mmproj-tiny.gguf").total_bytes
    assert rows["RAM", "vision"] == weights + vision_work_bytes(small, is_on_gpu=False)
    blind = json.loads(run("-m", path, "--vision", "off", "--json").stdout)
    assert ("RAM", "vision") not in {(row["place"], row["part"]) for row in blind["rows"]}
    assert "tq1_0 is for a model that is still to be made" in str(run("-m", path, "--recipe", "tq1_0").exception)


@pytest.mark.skipif(not _KIMI_CONFIG.exists(), reason="needs ../shared/data/kimi-tokenizer/config.json")
def test_a_checkpoint_needs_only_its_config(tmp_path):
    shutil.copy(_KIMI_CONFIG, tmp_path / "config.json")
    subject, known = find_subject(str(tmp_path)), find_subject("kimi-k2.6")
    assert subject.sizes_in("tq1_0").expert_bytes == known.sizes_in("tq1_0").expert_bytes
    assert subject.vision_bytes == pytest.approx(known.vision_bytes, rel=0.002)
    assert subject.kept == known.kept == ("q4_0-lossless",)


def test_the_command_that_follows_makes_the_file_that_was_planned():
    """With --rest too: quantize's exceptions by name give every tensor the type that the plan counts."""
    subject = find_subject("moonlight")
    plan = make_plan(subject.sizes_in("tq2_0", "q4_0"), HERE)
    command = shlex.split(next_line(plan, "folder", "tq2_0", is_checkpoint=True, rest="q4_0"))
    assert command[:6] == ["kimi-lite", "quantize", "folder", "OUT.gguf", "--recipe", "tq2_0"]
    recipe = with_overrides(named_recipe("tq2_0"), [command[command.index("--tensor-type") + 1]])
    tensors = [
        (name, shape, recipe.choose(name, shape, name).layout) for name, shape in tensor_shapes(subject.config).items()
    ]
    assert sizes_of(subject.config, tensors).bytes_by_type == plan.sizes.bytes_by_type


def test_a_choice_is_made_where_nothing_runs():
    subject = find_subject("kimi-k2.5")
    nothing = list(choices(subject, described(HERE, None, 0), Options(ram_bytes=GIB)))
    assert [choice.recipe for choice in nothing] == list(subject.recipes)
    assert best_choice(nothing).plan.refusal and best_choice(nothing).recipe == "iq1_s"
    assert set(RECIPES) >= {choice.recipe for choice in nothing[1:]}


def test_the_panel_above_a_chat_is_short():
    subject = find_subject("kimi-k2.5")
    desktop = described(HERE, 256 * GIB, 24 * GIB)
    for recipe, place in (("tq1_0", "RAM"), ("q2_k", "disk")):
        plan = make_plan(subject.sizes_in(recipe), desktop)
        for width in WIDTHS:
            assert all(len(line) <= width for line in start_panel(plan, "thinking on (temp 1.0)", width=width))
        lines = start_panel(plan, "thinking on (temp 1.0)")
        assert len(lines) <= 8, lines
        text = "\n".join(lines)
        assert "experts)" in text and "thinking on" in text and "limit" in text and "assumed)" in text
        assert any(line.strip().startswith(place) for line in lines)


def test_the_panel_names_the_place_that_sets_the_limit():
    desktop = described(HERE, 256 * GIB, 24 * GIB)
    for model, recipe, place in (
        ("moonlight", "q4_0", "VRAM"),
        ("kimi-k2.5", "tq1_0", "RAM"),
        ("kimi-k2.5", "q4_0", "disk"),
    ):
        text = " ".join(start_panel(make_plan(find_subject(model).sizes_in(recipe), desktop)))
        assert re.search(rf"\({place} [\d.]+ GB/s, assumed\)", " ".join(text.split())), text


def test_one_line_for_other_commands():
    subject = find_subject("kimi-k2.5")
    large = described(HERE, 512 * GIB, 24 * GIB)
    assert "fits, context 32,768: expected" in verdict_line(make_plan(subject.sizes_in("tq1_0"), large))
    assert "would not run" in verdict_line(make_plan(subject.sizes_in("tq1_0"), HERE, Options(ram_bytes=GIB)))
    assert "would come from disk" in verdict_line(make_plan(subject.sizes_in("q4_0"), large))


def test_what_to_do_next_and_what_would_run_instead(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    assert f"kimi-lite chat -m {path} -c 2048 --kv-dtype q8 --ram 4G" in " ".join(
        run("-m", path, "-c", "2K", "--kv-dtype", "q8", "--ram", "4G").stdout.replace("\\\n", "").split()
    )
    text = run("--recipe", "q4_0", "--ram", "15G", "--vram", "0").stdout
    command = re.search(r"Instead +kimi-lite plan (-m moonlight --recipe \w+ --ram 15G --vram 0)$", text, re.M)[1]
    assert json.loads(run(*command.split(), "--json").stdout)["verdict"] == "fits"
    assert "Instead" not in run("--recipe", "q4_0", "--vram", "12G", "--ram", "32G", "--rest", "q8_0").stdout
    assert not run("-m", "moonlight", "--recipe", "kimi").stdout
    assert "experts at least" in run("--recipe", "tq1_0", "--ram", "20G", "--vram", "0").exception.message


def test_a_disk_too_small_is_said(monkeypatch):
    """On this machine; a hypothetical one's disk is not known."""
    large = replace(HERE, ram_total_bytes=256 * GIB, ram_free_bytes=200 * GIB)
    monkeypatch.setattr(hardware, "probe", lambda *_: large)
    error = run("--recipe", "tq1_0").exception
    assert "The file needs 212" in error.message and "100.0 GiB are free at /models" in error.message
    assert "-c" not in error.hint and "tokens/s" not in error.hint, "none of that saves disk"
    assert not run("--recipe", "tq1_0", "--ram", "512G").exception
    assert not run("-m", "moonlight", "--recipe", "q8_0").exception


def test_the_cache_of_several_sequences_is_told_as_it_is():
    sizes = find_subject("moonlight").sizes_in("q4_0")
    one, four = (make_plan(sizes, HERE, Options(context_length=8192, num_sequences=count)) for count in (1, 4))
    assert (one.num_cache_pages, four.num_cache_pages) == (128, 512)
    assert four.part_bytes("RAM", KV) == 4 * one.part_bytes("RAM", KV)
    assert any("4 x 8,192 tokens in f16" in line for line in plan_lines(four))


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(
    ("flags", "needs"),
    [
        (("--device", "cuda:9"), 10),
        (("--device", "cuda:1"), 2),
        (("--device", "cuda:0,cuda:7"), 8),
        (("--device", "cuda:0,cuda:1", "--vram", "12G"), 2),  # a limit: it does not say how many there are
        (("--device", "cuda:0,cuda:1", "--vram", "24G+12G"), 0),
        (("--device", "cuda:9", "--vram", "24G"), 0),
        (("--device", "cuda:0"), 0),
        (("--device", "cpu"), 0),
        (("--device", "gpu"), 99),
    ],
)
def test_a_gpu_that_is_not_here_is_not_another_one(monkeypatch, count, flags, needs):
    """`needs`: so many GPUs, or --vram that describes them."""
    monkeypatch.setattr("kimi_lite.engine.device.count_gpus", lambda: count)
    result = run("--model", "moonlight", "--recipe", "q4_k", "--ram", "64G", *flags)
    if count >= needs:
        assert not isinstance(result.exception, KimiLiteError) or "there is no cuda" not in str(result.exception)
        assert "Machine" in result.stdout
    else:
        assert isinstance(result.exception, KimiLiteError) and flags[1] in result.exception.message
        assert "--device" in result.exception.hint and "Machine" not in result.stdout
