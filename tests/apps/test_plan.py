"""`kimi-lite plan`: tables of 80 columns, JSON, refusals with exit code 2, and every way to name a model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.cli import app
from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware import probe as hardware
from kimi_lite.hardware.probe import Disk, Hardware, described, free_of
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.subject import RECIPES, best_choice, choices, find_subject
from kimi_lite.plan.view import disk_warning, plan_lines, start_panel, verdict_line
from kimi_lite.units import GIB
from tests.tiny import write_tiny_gguf

_KIMI_CONFIG = Path(__file__).parents[3] / "shared/data/kimi-tokenizer/config.json"
HERE = Hardware("a CPU", 8, "avx2", 32 * GIB, free_of(32 * GIB), disk=Disk(Path("/models"), 100 * GIB), clock_hz=4e9)


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """The same machine every time."""
    monkeypatch.setattr(hardware, "probe", lambda path=None, is_measuring=False: HERE)
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))


def run(*arguments):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, (KimiLiteError, SystemExit)), result.exception
    return result


def desk(*arguments):
    return run("--vram", "24G", "--ram", "256G", *arguments)


def test_the_issue_s_own_call():
    result = run("--model", "kimi-k2.5", "--recipe", "tq1_0", "--vram", "24G", "--ram", "256G", "-c", "32K")
    text = result.stdout
    assert result.exit_code == 0
    assert all(len(line) <= 80 for line in text.splitlines()), max(text.splitlines(), key=len)
    for part in (
        "another machine",
        "dense weights",
        "KV cache",
        "32,768 tokens in f16",
        "vision",
        "expert slots",
        "of 23,040 experts",
    ):
        assert part in text
    assert "reads 4.46 GB of experts from RAM" in text and "* assumed" in text and "Verdict   fits" in text


def test_json_is_one_document():
    document = json.loads(desk("--recipe", "tq1_0", "--json").stdout)
    assert document["recipe"] == "tq1_0" and document["verdict"] == "fits" and document["recipes"] == []
    assert document["num_vram_slots"] > 500 and document["hardware"]["ram_total_bytes"] == 256 * GIB


def test_without_a_recipe_the_finest_that_fits_is_planned():
    document = json.loads(desk("--json").stdout)
    assert document["recipe"] == "tq1_0" and len(document["recipes"]) > 8
    verdicts = {other["recipe"]: other["verdict"] for other in document["recipes"]}
    assert verdicts["tq2_0"] == "from disk" and verdicts["tq1_0"] == "fits" and "q4_0-lossless" in verdicts
    text = desk().stdout
    assert "* tq1_0: planned above" in text and "from disk" in text
    assert json.loads(run("-m", "moonlight", "--json").stdout)["recipe"] == "q8_0"


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
    assert "another machine" not in text and "--ram allows 20.0 GiB" in text and "no GPU" in text


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
    slow, fast = (json.loads(desk("--recipe", "tq1_0", "--ram-speed", speed, "--json").stdout) for speed in (40, 80))
    assert slow["rates"]["ram"] == {"per_s": 40e9, "origin": "given"}
    assert slow["decode"]["tok_s"] < fast["decode"]["tok_s"]


def test_a_file_has_its_types(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), types={"_exps": "F16"})
    (tmp_path / "mmproj-tiny.gguf").write_bytes(bytes(2 << 20))
    document = json.loads(run("-m", path, "--json").stdout)
    assert document["types"].startswith("F16 experts") and document["verdict"] == "fits"
    rows = {(row["place"], row["part"]): row["num_bytes"] for row in document["rows"]}
    assert rows["RAM", "vision"] == 2 << 20
    blind = json.loads(run("-m", path, "--no-vision", "--json").stdout)
    assert ("RAM", "vision") not in {(row["place"], row["part"]) for row in blind["rows"]}
    assert "--recipe tq1_0 is for what is yet to be made" in str(run("-m", path, "--recipe", "tq1_0").exception)


@pytest.mark.skipif(not _KIMI_CONFIG.exists(), reason="needs ../shared/data/kimi-tokenizer/config.json")
def test_a_checkpoint_needs_only_its_config(tmp_path):
    shutil.copy(_KIMI_CONFIG, tmp_path / "config.json")
    subject, known = find_subject(str(tmp_path)), find_subject("kimi-k2.6")
    assert subject.sizes_in("tq1_0").expert_bytes == known.sizes_in("tq1_0").expert_bytes
    assert subject.vision_bytes == pytest.approx(known.vision_bytes, rel=0.002)
    assert subject.has_int4_experts == known.has_int4_experts


def test_the_best_recipe_is_made_without_help():
    subject = find_subject("kimi-k2.5")
    other = described(HERE, 256 * GIB, 24 * GIB)
    every = list(choices(subject, other, Options()))
    assert [choice.recipe for choice in every] == list(subject.recipes)
    assert best_choice(every).recipe == "tq1_0", "iq1_m needs an importance matrix"
    nothing = list(choices(subject, described(HERE, None, 0), Options(ram_bytes=GIB)))
    assert best_choice(nothing).plan.refusal and set(RECIPES) >= {choice.recipe for choice in nothing[1:]}


def test_the_panel_above_a_chat_is_short():
    subject = find_subject("kimi-k2.5")
    desk = described(HERE, 256 * GIB, 24 * GIB)
    for recipe, place in (("tq1_0", "RAM"), ("iq2_xxs", "disk")):
        lines = start_panel(make_plan(subject.sizes_in(recipe), desk), "thinking on (temp 1.0)")
        assert len(lines) <= 8 and all(len(line) <= 80 for line in lines), lines
        text = "\n".join(lines)
        assert "slots" in text and "thinking on" in text and "ceiling" in text and "(assumed)" in text
        assert any(line.strip().startswith(place) for line in lines)


def test_the_panel_names_the_place_that_sets_the_ceiling():
    desk = described(HERE, 256 * GIB, 24 * GIB)
    for model, recipe, place in (
        ("moonlight", "q4_0", "VRAM"),
        ("kimi-k2.5", "tq1_0", "RAM"),
        ("kimi-k2.5", "q4_0", "disk"),
    ):
        text = " ".join(start_panel(make_plan(find_subject(model).sizes_in(recipe), desk)))
        assert f" GB/s {place} (assumed)" in " ".join(text.split())


def test_one_line_for_other_commands():
    subject = find_subject("kimi-k2.5")
    large = described(HERE, 512 * GIB, 24 * GIB)
    assert "fits, context 32,768: at most" in verdict_line(make_plan(subject.sizes_in("tq1_0"), large))
    assert "would not run" in verdict_line(make_plan(subject.sizes_in("tq1_0"), HERE, Options(ram_bytes=GIB)))
    assert "would come from disk" in verdict_line(make_plan(subject.sizes_in("q4_0"), large))


def test_what_to_do_next_and_what_would_run_instead(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    assert (
        f"kimi-lite chat -m {path} -c 2048 --kv-dtype q8 --ram 4G"
        in run("-m", path, "-c", "2K", "--kv-dtype", "q8", "--ram", "4G").stdout
    )
    text = run("--recipe", "q4_0", "--ram", "15G", "--vram", "0").stdout
    assert "kimi-lite plan -m moonlight --recipe q4_0" in text
    assert not run("-m", "moonlight", "--recipe", "kimi").stdout
    assert "experts at least" in run("--recipe", "tq1_0", "--ram", "20G", "--vram", "0").exception.message


def test_a_disk_too_small_is_said():
    plan = make_plan(find_subject("kimi-k2.5").sizes_in("tq1_0"), HERE)
    assert "of disk, and 100.0 GiB are free" in disk_warning(plan)
    assert not disk_warning(make_plan(find_subject("moonlight").sizes_in("q8_0"), HERE))
    assert all(len(line) <= 80 for line in plan_lines(plan))
