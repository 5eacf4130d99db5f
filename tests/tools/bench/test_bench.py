"""kimi-lite bench: the language of tests, the figures against an outside stopwatch, the document against its schema."""

import csv
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite import cli
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.costs import decode_cost, expected_expert_share
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.recorder import read_trace
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.cpu.threads import Team
from kimi_lite.options import Options
from kimi_lite.tools.bench import bench, command, environment, roofline
from kimi_lite.tools.bench import run as bench_run
from kimi_lite.tools.bench.ours import Ours, Run
from kimi_lite.tools.bench.plan import BenchTest, Passages, load_tokens, plan_tests
from kimi_lite.tools.bench.report import bar
from kimi_lite.tools.bench.result import Spread, find_regressions
from kimi_lite.tools.bench.roofline import Bandwidth
from kimi_lite.tools.kernels.ggml_cpu import describe_ggml
from tests.apps.terminal import Terminal
from tests.tiny import write_tiny_gguf

SCHEMA = Path(bench.__file__).parents[1] / "data" / "bench.schema.json"
has_llama = "not installed" not in describe_ggml()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", np.random.default_rng(0))


@pytest.fixture
def quick(monkeypatch):
    """The bandwidth takes a second and half a gigabyte; its own test measures it."""
    monkeypatch.setattr(bench, "measure_bandwidth", lambda team: Bandwidth(20.0, False, 0.0))


def run_bench(*arguments: str | Path):
    return CliRunner().invoke(command.app, [*map(str, arguments)])


def last_document(text: str) -> dict:
    return json.loads(text.strip().rpartition("\n")[2])


def names(**flags: object) -> list[str]:
    given = {"prompt": "512", "generate": "128", "depths": "0", "batches": "1", "is_sweep": False} | flags
    return [test.name for test in plan_tests(**given)]


def test_llama_benchs_language():
    assert names() == ["pp512", "tg128"]
    assert names(depths="0,4K") == ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]
    assert names(prompt="0", generate="8,16", batches="1,4") == ["tg8", "tg16", "tg8 x4", "tg16 x4"]
    assert names(depths="0,1024", is_sweep=True)[2:4] == ["pp512 @ d512", "tg128 @ d512"]
    for wrong in (
        {"prompt": "x"},
        {"prompt": "0", "generate": "0"},
        {"batches": "0"},
        {"prompt": "0", "is_sweep": True},
    ):
        with pytest.raises(KimiLiteError):
            names(**wrong)


def test_passages_repeat_prefixes_and_nothing_else():
    passages, test = Passages(np.arange(500, 900, dtype=np.int32)), BenchTest("pp", 64, depth=100, num_sequences=2)
    turns = [passages.prompts(test) for _ in range(20)]
    assert len({tuple(prompt.prefix for prompt in turn) for turn in turns}) == 1
    assert len({prompt.fresh[0] for turn in turns for prompt in turn}) == 40
    assert {(len(p.prefix), len(p.fresh)) for turn in turns for p in turn} == {(100, 64)}
    (start,) = passages.prompts(BenchTest("tg", 8))
    assert (len(start.prefix), len(start.fresh)) == (0, 1)


def test_figures_agree_with_an_outside_stopwatch(tiny):
    """The clock of a run starts after its prefix is in the cache: what it reports, and what the caller waits, differ by
    that."""
    tests = [BenchTest("pp", 2048, num_sequences=2), BenchTest("tg", 400)]
    ours = Ours(tests, Options(model=str(tiny), num_threads=1))
    passages = Passages(load_tokens(ours.tokenizer, is_random=False))
    for test in tests:
        errors = []
        for _ in range(4):
            prompts = passages.prompts(test)
            start_s = time.perf_counter()
            run = ours.run(test, prompts)
            errors.append(abs((time.perf_counter() - start_s) / run.seconds - 1))
            assert len(run.gaps_s) == (0 if test.kind == "pp" else 400)
            assert test.total_tokens - 16 <= run.num_tokens <= test.total_tokens
        assert min(errors) < 0.05, (test, errors)
    ours.close()


@pytest.mark.parametrize("depth", [1, 63, 64, 100])
def test_what_is_timed_is_what_is_named(tiny, depth):
    """Tokens that the model computes in a run, after a prefix that is in the cache."""
    tests = [BenchTest("pp", 50, depth), BenchTest("tg", 10, depth, num_sequences=3), BenchTest("pp", 50, 0, 2)]
    ours = Ours(tests, Options(model=str(tiny), num_threads=1))
    passages = Passages(load_tokens(ours.tokenizer, is_random=True))
    forward, counts = ours.engine.model.forward, []
    ours.engine.model.forward = lambda batch, stop: counts.append(len(batch.token_ids)) or forward(batch, stop)
    for test in tests * 2:
        prompts = passages.prompts(test)
        for prompt in prompts:
            if prompt.prefix:
                ours._generate([prompt.prefix], 1)
        counts.clear()
        run = ours.run(test, prompts)
        primed = sum(bool(prompt.prefix) for prompt in prompts)
        assert counts[:primed] == [1] * primed  # the prefix's last token always runs
        timed = sum(counts[primed:])
        assert timed == (run.num_tokens if test.kind == "pp" else run.num_tokens + test.num_sequences), (test, counts)
    ours.close()


def test_document_fits_its_schema(tiny, quick):
    jsonschema = pytest.importorskip("jsonschema", reason="the test extra brings jsonschema")
    flags = ["-m", tiny, "-p", "32", "-n", "8", "-d", "0,64", "-r", "2", "-t", "1", "-b", "1,2"]
    done = run_bench(*flags, *(["--compare", "llama.cpp"] if has_llama else []))
    assert done.exit_code == 0, done.output
    document = last_document(done.stdout)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert len(document["results"]) == (16 if has_llama else 8)
    plan = document["memory_plan"]
    kv_bytes = next(row["num_bytes"] for row in plan["rows"] if row["part"] == "KV cache")
    config = ModelConfig.from_metadata(GGUFStore.open(tiny).metadata)
    assert kv_bytes == plan["num_cache_pages"] * 64 * config.num_layers * config.kv_latent_size * 2
    assert plan["num_cache_pages"] == plan["num_sequences"] * -(-plan["context_length"] // 64)
    remark = f"{plan['context_length']:,} tokens in f16"
    assert any(
        "KV cache" in line and f"{plan['num_sequences']} x {remark}" in line for line in done.stdout.splitlines()
    )
    assert len(document["comparison"]) == (8 if has_llama else 0)
    lines = done.stdout.splitlines()[:-1]
    assert max(map(len, lines)) <= 82, max(lines, key=len)
    roofline_line, result_line = (
        next(i for i, line in enumerate(lines) if text in line) for text in ("expected", "t/s warm")
    )
    assert roofline_line < result_line
    for ours, theirs in zip(document["results"][::2], document["results"][1::2], strict=True) if has_llama else ():
        assert (ours["program"], theirs["program"]) == ("kimi-lite", "llama.cpp")
        ratio = next(each["ratio"] for each in document["comparison"] if each["test"] == ours["test"])
        expected = np.divide(ours["tok_s"]["samples"], theirs["tok_s"]["samples"])
        assert ratio["samples"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("output", ["csv", "json", "jsonl", "md"])
def test_outputs_are_what_they_are_called(tiny, quick, output):
    done = run_bench("-m", tiny, "-p", "16", "-n", "4", "-r", "1", "-t", "1", "-o", output, "--sweep", "-d", "0,16")
    assert done.exit_code == 0, done.output
    tests = ["pp16", "tg4", "pp16 @ d16", "tg4 @ d16"]
    lines = done.stdout.splitlines()
    if output == "csv":
        assert [row["test"] for row in csv.DictReader(lines)] == tests
        assert [row["program"] for row in csv.DictReader(lines)] == ["kimi-lite"] * 4
    else:
        assert [result["test"] for result in last_document(done.stdout)["results"]] == tests
    if output.startswith("json"):
        assert len([json.loads(line) for line in lines]) == {"json": 1, "jsonl": 5}[output]
    tables = done.stdout if output == "md" else done.stderr
    assert "N_KV" in tables and "t/s warm" in tables
    assert "generating, tokens/s at each depth" in tables and "█" * 40 in tables


def test_markdown_on_a_terminal_has_no_json(tiny):
    """30 rows of JSON would push the table away."""
    terminal = Terminal("kimi_lite", "bench", *f"-m {tiny} -p 0 -n 4 -r 1 -t 1".split(), num_rows=60, num_columns=90)
    terminal.timeout_s = 120
    assert terminal.wait() == 0
    assert "tg4" in terminal.seen and '"tool"' not in terminal.seen
    terminal.close()


def test_bars_are_as_long_as_their_share():
    assert [bar(share, 4) for share in (-1, 0, 1 / 32, 0.5, 0.99, 1, 7)] == ["", "", "▏", "██", "████", "████", "████"]


def test_the_gpu_path_is_measured(tiny, quick, monkeypatch):
    """With a CPU device standing in as the GPU."""
    from kimi_lite.model.hybrid import load
    from tests.model.hybrid.stand_in import GPU, StandInKernels

    monkeypatch.setattr("kimi_lite.engine.loader.choose_device", lambda wanted: "cpu:0")
    monkeypatch.setattr("kimi_lite.engine.loader.find_gpu", lambda device: GPU)
    monkeypatch.setattr(load, "TritonKernels", StandInKernels)
    done = run_bench("-m", tiny, "-p", "16", "-n", "4", "-r", "1", "-t", "1")
    assert done.exit_code == 0, done.output
    document = last_document(done.stdout)
    assert {"VRAM", "RAM"} <= set(document["limits"][0]["bytes_by_place"])
    assert document["results"][1]["tok_s"]["mean"] > 0
    refused = run_bench("-m", tiny, "-p", "0", "-n", "4", "-r", "1", "-t", "1", "--trace", "x.json")
    assert isinstance(refused.exception, KimiLiteError) and "python -m tools.trace" in refused.exception.hint


def test_the_command_line_has_it(tiny, quick):
    done = CliRunner().invoke(
        cli.app, ["bench", "-m", str(tiny), "-p", "0", "-n", "4", "-r", "1", "-t", "1", "--random"]
    )
    assert done.exit_code == 0, done.output
    assert last_document(done.stdout)["text"] == "random"
    assert "--compare" in CliRunner().invoke(cli.app, ["bench", "--help"]).stdout
    assert CliRunner().invoke(cli.app, ["bench", "--nonsense"]).exit_code == 2
    with pytest.raises(KimiLiteError, match="context"):
        CliRunner().invoke(cli.app, ["bench", "-m", str(tiny), "-d", "8K"], catch_exceptions=False)


def test_missing_llama_says_how_to_get_it(monkeypatch, tiny):
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp.llama_cpp", None)
    with pytest.raises(KimiLiteError, match="llama-cpp-python") as caught:
        CliRunner().invoke(command.app, ["-m", str(tiny), "--compare", "llama.cpp"], catch_exceptions=False)
    assert "kimi-lite[ggml]" in caught.value.hint


def test_costs_are_the_bytes_of_the_file(tiny):
    store = GGUFStore.open(tiny)
    config = ModelConfig.from_metadata(store.metadata)
    sizes = store_sizes(store, config)
    cost = decode_cost(sizes, depth=100, value_bytes=2)
    routed = sum(t.num_bytes for name, t in store.tensors.items() if "_exps" in name)
    embedding = store.tensors["token_embd.weight"]
    assert cost.expert_bytes == pytest.approx(routed * config.num_experts_used / config.num_experts)
    row_bytes = embedding.num_bytes / embedding.shape[0]
    assert cost.resident_bytes == store.total_bytes - routed - embedding.num_bytes + row_bytes
    assert cost.cache_bytes == 100 * config.num_layers * config.kv_latent_size * 2
    assert cost.token_bytes == pytest.approx(4 * config.active_parameters + row_bytes + cost.cache_bytes)  # F32
    many = decode_cost(sizes, 100, 2, num_sequences=1000)
    assert many.expert_bytes == pytest.approx(routed) and many.cache_bytes == 1000 * cost.cache_bytes
    assert expected_expert_share(config, 1) == pytest.approx(config.num_experts_used / config.num_experts)


def test_bandwidth_is_plausible():
    team = Team(1)
    assert 0.5 < roofline.measure_bandwidth(team).gb_s < 2000
    team.close()


def test_disturbed_turns_are_dropped_with_what_ran_beside_them(monkeypatch):
    """Program "b" is disturbed in its second and third run; both programs lose those turns."""
    waits = iter([0, 0, 0, 0, 1, 1] + [0] * 20)  # one for each run of b: first, turns 1, 2, ...
    lost = {"s": 0.0}
    runs = []

    def run(name):
        def runner(test, prompts):
            runs.append(name)
            time.sleep(0.002)
            if name == "b":
                lost["s"] += next(waits)
            return Run(1.0 + len(runs), 10, 0.1, ())

        return runner

    monkeypatch.setattr(bench_run, "read_waited_s", lambda: lost["s"])
    monkeypatch.setattr(bench_run, "read_stolen_s", lambda: 0.0)
    passages = Passages(np.arange(500, dtype=np.int32))
    samples = bench_run.measure_test(BenchTest("pp", 10), {"a": run("a"), "b": run("b")}, passages, 5, 1)
    assert {name: (len(s.warm), s.num_dropped, s.is_noisy) for name, s in samples.items()} == dict.fromkeys(
        "ab", (5, 2, False)
    )
    assert runs[:6] == ["a", "b", "a", "b", "b", "a"]  # the order turns round
    waits = iter([0] + [1] * 20)
    noisy = bench_run.measure_test(BenchTest("pp", 10), {"a": run("a"), "b": run("b")}, passages, 5, 1)["a"]
    assert noisy.is_noisy and len(noisy.warm) == 5 and noisy.num_dropped == 5


def document(share: float, ratio: float, sd: float) -> dict:
    spread = {"mean": 10.0, "sd": 10 * sd, "samples": [10.0] * 4}
    return {
        "results": [{"test": "tg8", "program": "kimi-lite", "limit_share": share, "tok_s": spread}],
        "comparison": [
            {"test": "tg8", "other": other, "ratio": {"mean": ratio, "sd": ratio * sd, "samples": [ratio] * 4}}
            for other in ("llama.cpp", "ik_llama.cpp")
        ],
    }


def test_regressions_are_what_falls_by_more_than_its_noise():
    before = document(0.8, 1.5, 0.02)
    assert find_regressions(before, document(0.79, 1.48, 0.02)) == []
    (share,) = find_regressions(before, document(0.76, 1.5, 0.02))
    assert "tg8: the share of the limit fell from 0.800 to 0.760" in share
    assert len(find_regressions(before, document(0.7, 1.3, 0.02))) == 3
    assert find_regressions(before, document(0.7, 1.3, 0.3)) == []
    assert find_regressions(before, {"results": [], "comparison": []}) == []
    [old, _] = before["comparison"]
    del old["other"]  # documents from before there were several programs: llama.cpp
    assert len(find_regressions(before | {"comparison": [old]}, document(0.8, 1.3, 0.02))) == 1


def test_baseline_is_an_exit_code(tiny, quick, tmp_path):
    flags = ["-m", tiny, "-p", "0", "-n", "16", "-r", "2", "-t", "1"]
    first = run_bench(*flags)
    old = last_document(first.stdout)
    old["results"][0]["limit_share"] *= 100
    (tmp_path / "old.json").write_text("noise\n" + json.dumps(old) + "\n")
    done = run_bench(*flags, "--baseline", tmp_path / "old.json")
    assert done.exit_code == 1 and "regression: tg16: the share of the limit fell" in done.stdout
    done = CliRunner().invoke(cli.app, ["bench", *map(str, flags), "--baseline", str(tmp_path / "old.json")])
    assert done.exit_code == 1
    old["results"][0]["limit_share"] /= 10_000
    (tmp_path / "old.json").write_text(json.dumps(old))
    done = run_bench(*flags, "--baseline", tmp_path / "old.json")
    assert done.exit_code == 0 and "no regression in 1 ratios" in done.stdout
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(KimiLiteError, match="does not end in"):
        bench.read_document(tmp_path / "old.json")


def test_spread():
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.sd) == (2.0, 1.0)
    assert Spread.of([5.0]).sd == 0


def test_header_hash_is_of_the_header(tiny, tmp_path):
    """Other weights, same names and settings: same hash; another setting: another."""
    rng = np.random.default_rng(1)
    other = write_tiny_gguf(tmp_path / "weights.gguf", rng)
    renamed = write_tiny_gguf(tmp_path / "name.gguf", rng, name="other")
    hashes = []
    for path in (tiny, other, renamed):
        store = GGUFStore.open(path)
        described = environment.describe_model(store, ModelConfig.from_metadata(store.metadata))
        assert described["file_bytes"] == path.stat().st_size
        hashes.append(described["header_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_shards_in_a_folder(tmp_path, quick):
    """Cold, and beside llama.cpp, which wants the first shard by name."""
    write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), max_tensors_per_shard=30)
    flags = ["-m", tmp_path, "-p", "8", "-n", "2", "-r", "1", "-t", "1", "--cold"]
    done = run_bench(*flags, *(["--compare", "llama.cpp"] if has_llama else []))
    assert done.exit_code == 0, done.output
    model = last_document(done.stdout)["model"]
    assert model["file"].endswith("-of-00002.gguf") and model["file_bytes"] > 5e6
    assert Path(model["file"]).stem.endswith("00001-of-00002")


def test_page_cache_is_dropped_without_harm(tiny):
    before = tiny.read_bytes()
    assert environment.drop_page_cache((tiny,)) in (True, False)
    assert tiny.read_bytes() == before


def test_a_model_beyond_the_memory(tmp_path, quick, monkeypatch):
    """With the disk tier the report says how many experts were there and what came from the disk, and the record is
    written."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), num_experts=32)
    quarter = ExpertIndex.find(store := GGUFStore.open(path), ModelConfig.from_metadata(store.metadata)).ram_bytes // 4
    monkeypatch.setattr(bench, "with_model", lambda options: replace(options, ram_expert_bytes=quarter))
    result = run_bench("-m", path, "-p", 16, "-n", 8, "-r", 1, "-t", 1, "--record-routing", tmp_path / "trace.npz")
    assert result.exit_code == 0, result.output
    assert "experts there" in result.stdout and "disk" in result.stdout
    found = {each["test"]: each for each in last_document(result.stdout)["results"]}
    assert 0 < found["tg8"]["expert_hit_share"] < 1
    assert len(read_trace(tmp_path / "trace.npz").ids) > 24
