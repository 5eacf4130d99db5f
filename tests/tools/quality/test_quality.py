"""Perplexity, divergence and multiple choice: the formulas on known numbers, and llama.cpp's word on the demo model."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.engine.scoring import (
    CHUNK_TOKENS,
    Estimate,
    Losses,
    OurLogits,
    chunks_of,
    diverge,
    join,
    log_softmax,
    losses,
)
from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.kernels.ggml_cpu import describe_ggml
from kimi_lite.tools.quality import quality
from kimi_lite.tools.quality.runs import LlamaLogits, StoredLogits, hash_ids, save_rows
from kimi_lite.tools.quality.tasks import CHOICES, Question, answer_all, load_questions
from tests.tiny import write_tiny_gguf

needs_llama = pytest.mark.skipif(
    "not installed" in describe_ggml(), reason="pip install 'kimi-lite[ggml]' brings llama.cpp"
)
V = 50


def random_log_probs(seed: int, rows: int = 40) -> np.ndarray:
    return log_softmax(3 * np.random.default_rng(seed).standard_normal((rows, V), np.float32))


def test_log_softmax_and_losses():
    logits = np.array([[0, np.log(3)], [1000, 1000]], np.float32)
    assert np.allclose(np.exp(log_softmax(logits)), [[0.25, 0.75], [0.5, 0.5]])
    assert losses(log_softmax(logits), np.array([0, 1])) == pytest.approx([np.log(4), np.log(2)])


def test_divergence_of_known_distributions():
    p, q = np.log(np.array([[0.5, 0.25, 0.25]], np.float32)), np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    found = diverge(q, p, np.array([0]))
    assert found.kl_nats == pytest.approx([0.25 * np.log(2)])
    assert found.ranks.tolist() == [1]  # p's best, 0, ties with 2 and comes after 1
    assert found.loss_differences == pytest.approx([np.log(2)]) and found.probability_differences == pytest.approx(
        [-0.25]
    )
    impossible = np.array([[0.0, -np.inf, -np.inf]], np.float32)
    assert diverge(q, impossible, np.array([0])).kl_nats == pytest.approx([np.log(4)])


def test_divergence_is_zero_from_itself_and_positive_otherwise():
    p, q, targets = random_log_probs(0), random_log_probs(1), np.arange(40)
    same, other = diverge(p, p, targets).to_json(), diverge(q, p, targets).to_json()
    assert same["kl_nats"]["max"] == 0 and same["top1_agreement"]["mean"] == 1 and same["rank"]["max"] == 1
    assert other["kl_nats"]["mean"] > 1 and other["top1_agreement"]["mean"] < 0.5 and other["rank"]["max"] > 5
    assert other["perplexity_ratio"]["mean"] == pytest.approx(np.exp((losses(q, targets) - losses(p, targets)).mean()))


def test_standard_error_covers_the_truth():
    rng = np.random.default_rng(0)
    estimates = [Estimate.of(rng.exponential(1.0, 400)) for _ in range(400)]
    assert 0.92 < np.mean([abs(e.mean - 1) < 2 * e.error for e in estimates]) < 0.98


def test_chunks():
    ids = list(range(3 * CHUNK_TOKENS + 5))
    assert [chunk[0] for chunk in chunks_of(ids, None)] == [0, 512, 1024]
    assert [chunk[0] for chunk in chunks_of(ids, 7, 2)] == [7, 7]
    assert not list(chunks_of(ids[:500], None))


def test_scores_of_some_chunks():
    """Concatenated chunks of 255 scored tokens: a part has its own tokens' scores and no others."""
    rng, targets = np.random.default_rng(0), np.zeros(255, np.int64)
    pairs = [(random_log_probs(seed, 255), random_log_probs(seed + 10, 255)) for seed in range(3)]
    parts = [diverge(p, q, targets) for p, q in pairs]
    whole = join(parts)
    for first, last in ((0, 1), (1, 3), (0, 3)):
        want = np.concatenate([part.kl_nats for part in parts[first:last]])
        assert np.array_equal(whole.of_chunks(first, last).kl_nats, want)
    nats = rng.random(3 * 255)
    assert np.array_equal(Losses(nats).of_chunks(1, 2).nats, nats[255:510])


def test_stored_logits(tmp_path):
    rows = [random_log_probs(i, 255) for i in range(2)]
    chunks = [np.arange(CHUNK_TOKENS, dtype=np.int32), np.zeros(CHUNK_TOKENS, np.int32)]
    save_rows(tmp_path / "base.safetensors", [each.astype(np.float16) for each in rows], "model", hash_ids(chunks))
    stored = StoredLogits(tmp_path / "base.safetensors", 2, hash_ids(chunks))
    divergence = diverge(rows[1], stored.scored_rows(1, chunks[1]), np.zeros(255, np.int64))
    assert 0 <= divergence.kl_nats.mean() < 1e-5 and (divergence.ranks == 0).all()
    with pytest.raises(KimiLiteError, match="other tokens"):
        StoredLogits(tmp_path / "base.safetensors", 1, hash_ids(chunks[:1]))
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(KimiLiteError) as caught:
        StoredLogits(tmp_path / "bad.safetensors", 1, "")
    assert "--save" in caught.value.hint


def test_questions_are_sound():
    questions = load_questions()
    assert len(questions) == len({q.question for q in questions}) == len(CHOICES.read_text().splitlines()) >= 40
    assert all(len(set(q.choices)) == 4 and 0 <= q.answer < 4 for q in questions)
    counts = np.bincount([q.answer for q in questions], minlength=4)
    assert counts.min() >= len(questions) // 4 - 1  # no place is favoured


class Letters:
    """A tokenizer of bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def test_choice_is_by_likelihood_and_by_likelihood_of_a_byte():
    """Every "a" has probability 0.5, every "b" 0.4: "bb" is likelier than "aaaa", and less likely by the byte."""
    table = np.full(256, 0.001)
    table[[ord("a"), ord("b"), ord(" ")]] = 0.5, 0.4, 1.0
    asked = []

    def logits(ids, first):
        asked.append((len(ids), first))
        return np.log(np.tile(table, (len(ids) - first, 1)), dtype=np.float64).astype(np.float32)

    short = answer_all(logits, Letters(), None, [Question("?", ("aa", "aaaa"), 0)])
    long = answer_all(logits, Letters(), 1, [Question("?", ("bb", "aaaa"), 1)])
    assert (short.accuracy.mean, long.accuracy.mean, long.accuracy_per_byte.mean) == (1, 0, 1)
    prompt = len(Question("?", (), 0).prompt)
    assert asked[0] == (prompt + 2, prompt - 1) and asked[2] == (prompt + 3, prompt)  # BOS before it


def test_whole_run_and_its_reference(tmp_path):
    """A run against itself by file, and against what it stored."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    flags = ["-m", path, "--chunks", "2", "-t", "1", "--save", tmp_path / "base.safetensors", "--reference", path]
    done = CliRunner().invoke(quality.app, [*map(str, flags)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert report["num_scored_tokens"] == 2 * 255 and report["multiple_choice"]["num_questions"] >= 40
    assert report["references"][0]["kl_nats"]["max"] < 1e-6
    assert 200 < report["perplexity"]["mean"] < 2000  # 300 random tokens
    held_out = {each["kind"]: each for each in report["held_out"]}
    assert {"chat", "code", "maths", "french"} <= held_out.keys()
    assert all(each["num_chunks"] == 2 and each["kl_nats"][0]["mean"] < 1e-6 for each in held_out.values())
    assert 0 <= report["references"][0]["held_out_kl_nats"] < 1e-6
    flags = ["-m", path, "--chunks", "2", "-t", "1", "--no-tasks", "--reference", tmp_path / "base.safetensors"]
    again = json.loads(CliRunner().invoke(quality.app, [*map(str, flags)]).stdout.strip().rpartition("\n")[2])
    assert again["references"][0]["kl_nats"]["mean"] < 1e-4 and again["references"][0]["top1_agreement"]["mean"] > 0.99
    assert CliRunner().invoke(quality.app, ["-m", str(path), "--chunks", "3", *map(str, flags[-2:])]).exit_code == 2


@needs_llama
def test_perplexity_is_llama_cpps(tmp_path):
    """A random model in float32: both compute the same function."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    done = CliRunner().invoke(
        quality.app, ["-m", str(path), "--chunks", "2", "-t", "1", "--no-tasks", "--compare", "llama.cpp"]
    )
    (theirs,) = json.loads(done.stdout.strip().rpartition("\n")[2])["references"]
    assert theirs["name"] == "llama.cpp"
    assert theirs["perplexity_ratio"]["mean"] == pytest.approx(1, abs=1e-4) and theirs["kl_nats"]["max"] < 1e-3


@needs_llama
def test_demo_perplexity_is_llama_cpps():
    """Within 0.5 %, on the same file, text and tokens: llama.cpp's tokenizer agrees as well."""
    from kimi_lite.demo.build import ensure_demo_model
    from kimi_lite.engine.scoring import TEXT

    try:
        path = ensure_demo_model(type_name="q8_0")
    except KimiLiteError as error:
        pytest.skip(f"the demo model cannot be built here: {error.message}")
    ours, theirs = OurLogits(path, 1), LlamaLogits(path, 1)  # on a busy machine more threads wait for each other
    ids = ours.tokenizer.encode(TEXT.read_text())
    assert ids == theirs.llama.tokenize(TEXT.read_text())
    own, ((other, _),) = quality.score_text(ours, [theirs], list(chunks_of(ids, ours.bos_id, 1)), lambda rows: None)
    ours.close()
    theirs.close()
    assert own.perplexity.mean == pytest.approx(other.perplexity.mean, rel=0.005)
