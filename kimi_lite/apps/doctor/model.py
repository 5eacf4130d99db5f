"""The doctor's checks of a model: are all shards there and sound, do words become the right ids, does the plan fit, do
kernels compile. Every error of the loader's becomes a line with its hint.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kimi_lite.apps.doctor.system import Check, Facts
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.arch.tensors import open_model
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware import host
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.view import verdict_line
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.units import gib

KIMI_VOCABULARY = 163_840
GOLDEN = {  # ids of the vendor's own tokenizer
    "Hello, world!": (19180, 11, 2695, 0),
    "你好，世界": (33845, 378, 2243),
    "  leading spaces\n\n\ttabs": (220, 8134, 14803, 382, 5604, 5609),
    "don't you'll WE'RE": (88709, 13556, 40893, 6, 1046),
    "naïve café 😀": (4768, 44187, 367, 70591, 70005, 222),
    "한국어 テスト": (17079, 54078, 28763, 220, 25875, 33360),
}
_ROUND_TRIPS = (*GOLDEN, "def f(x):\n    return x**2\n", "\u3000\u3000全角", "a\u0301\u200d\r\n\t\x00")


def model_checks(path: Path, facts: Facts) -> Iterator[Check]:
    """Nothing is loaded: headers, vocabulary and arithmetic."""
    try:
        store, config = open_model(path)
    except KimiLiteError as error:
        yield Check("model", "fail", error.message, error.hint)
        return
    shards = f"{len(store.shards)} shards, all there" if len(store.shards) > 1 else "one file"
    yield Check("model", "ok", f"{config.name}: {gib(store.total_bytes)} in {shards}, {len(store.tensors):,} tensors")
    if host.is_on_windows_drive(path):
        fix = "copy it to the Linux side, below ~: weights are read in place"
        yield Check("place", "warn", f"{path} is on a drive of Windows, which WSL2 reads slowly", fix)
    yield check_tokenizer(store)
    yield check_plan(store, config, facts)


def check_tokenizer(store: GGUFStore) -> Check:
    """Kimi's ids must be the vendor's; any vocabulary must give back what it was given."""
    try:
        tokenizer = Tokenizer.from_metadata(store.metadata)
    except KimiLiteError as error:
        return Check("tokenizer", "fail", error.message, error.hint)
    is_kimi = tokenizer.vocab_size == KIMI_VOCABULARY
    wrong = [text for text, ids in GOLDEN.items() if is_kimi and tuple(tokenizer.encode(text)) != ids]
    lost = [text for text in _ROUND_TRIPS if tokenizer.decode(tokenizer.encode(text)) != text]
    fix = "the file's vocabulary or pre-tokenizer is damaged: fetch it again, or convert it with kimi-lite quantize"
    if wrong:
        return Check(
            "tokenizer",
            "fail",
            f"{len(wrong)} of {len(GOLDEN)} texts get other ids than the vendor's: {wrong[0]!r}",
            fix,
        )
    if lost:
        return Check("tokenizer", "fail", f"{lost[0]!r} does not come back from its ids", fix)
    golden = (
        f"{len(GOLDEN)} texts get the vendor's ids"
        if is_kimi
        else f"{len(_ROUND_TRIPS)} texts come back from their ids"
    )
    return Check("tokenizer", "ok", f"{tokenizer.vocab_size:,} tokens; {golden}")


def check_plan(store: GGUFStore, config: ModelConfig, facts: Facts) -> Check:
    """The plan's verdict on this machine."""
    plan = make_plan(store_sizes(store, config), replace(facts.hardware, more_gpus=()))  # as `chat` without --device
    if plan.refusal:
        return Check("plan", "fail", plan.refusal.problem, plan.refusal.hint.replace("\n", " "))
    if plan.verdict == "fits":
        return Check("plan", "ok", verdict_line(plan))
    return Check("plan", "warn", verdict_line(plan), f"kimi-lite plan -m {store.path} shows what lies where")


def warm(path: Path) -> Check:
    """Compiles every kernel of the model by loading it and running one token."""
    from kimi_lite.engine.loader import load
    from kimi_lite.engine.types import Request, SamplingParams
    from kimi_lite.options import Options

    try:
        with load(path, Options(context_length=256)) as engine:
            prompt = tuple(engine.tokenizer.encode("Hello, world! " * 12))[:100]
            sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
            num_tokens = sum(token.id is not None for token in engine.generate([Request("warm", prompt, sampling)]))
    except KimiLiteError as error:
        return Check("warm", "fail", error.message, error.hint)
    return Check("warm", "ok", f"kernels of {path.name} are compiled; {num_tokens} tokens ran")
