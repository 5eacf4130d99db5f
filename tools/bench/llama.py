"""llama.cpp through llama-cpp-python (the `ggml` extra), on the same file: speed for `tools.bench`, logits for
`tools.quality`.

The low-level binding, so that batches, positions and logits are exactly those of our own runs.
"""

import ctypes
import time
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.bench.ours import Run
from kimi_lite.tools.bench.plan import BenchTest, Prompt

BATCH_TOKENS = 512  # as ours, and llama.cpp's own default for n_ubatch


@cache
def no_log():
    """A log function that says nothing; kept for good, because llama.cpp calls it until the process ends."""
    return import_llama_cpp().llama_log_callback(lambda level, text, data: None)


class Llama:
    """A loaded model and a context for `num_sequences` sequences of up to `context_length` tokens each."""

    name = description = "llama.cpp"

    def __init__(self, path: Path, num_threads: int, context_length: int, num_sequences: int = 1) -> None:
        self._api = api = import_llama_cpp()
        api.llama_log_set(no_log(), ctypes.c_void_p())
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.use_extra_bufts = False  # AMX buffers, which MLA models trip over
        self._model = api.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise KimiLiteError(f"llama.cpp cannot load {path}.", "Leave out --compare.")
        params = api.llama_context_default_params()
        params.n_ctx = num_sequences * -(-context_length // 256) * 256
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = num_threads
        params.n_seq_max = num_sequences
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise KimiLiteError(f"llama.cpp cannot make a context of {params.n_ctx:,} tokens.", "Use a smaller -d.")
        self._memory = api.llama_get_memory(self._context)
        self._begin(num_sequences)

    def _begin(self, num_sequences: int) -> None:
        """With a model and a context."""
        api = self._api
        self._batch = api.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._cached: list[tuple[int, ...]] = [()] * num_sequences  # tokens in the cache

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def run(self, test: BenchTest, prompts: Sequence[Prompt]) -> Run:
        """As `ours.Ours.run`: prefixes first, then the clock."""
        for sequence, prompt in enumerate(prompts):
            self._rewind(sequence, prompt.prefix)
        start_s = time.perf_counter()
        best = [self._prefill(sequence, prompt.fresh) for sequence, prompt in enumerate(prompts)]
        arrivals_s = [time.perf_counter()]
        for _ in range(test.num_tokens if test.kind == "tg" else 0):
            best = self._decode([(sequence, token) for sequence, token in enumerate(best)])
            arrivals_s.append(time.perf_counter())
        seconds = arrivals_s[0] - start_s if test.kind == "pp" else arrivals_s[-1] - arrivals_s[0]
        gaps_s = tuple(b - a for a, b in pairwise(arrivals_s))
        return Run(seconds, test.total_tokens, arrivals_s[0] - start_s, gaps_s)

    def logits(self, ids: np.ndarray, first: int = 0) -> np.ndarray:
        """float32 (T - first, vocabulary): rows `first ..` of one prompt of at most `BATCH_TOKENS` tokens."""
        self._rewind(0, ())
        self._decode_rows([(0, int(token), at, at >= first) for at, token in enumerate(ids)])
        return np.stack([self._row(at) for at in range(first, len(ids))])

    def tokenize(self, text: str) -> list[int]:
        """By llama.cpp's own tokenizer, without tokens that it would add; control tokens are text."""
        vocab, data = self._api.llama_model_get_vocab(self._model), text.encode()
        ids = (ctypes.c_int32 * (len(data) + 1))()
        count = self._api.llama_tokenize(vocab, data, len(data), ids, len(ids), False, False)
        assert count >= 0, count
        return ids[:count]

    def _rewind(self, sequence: int, prefix: tuple[int, ...]) -> None:
        """Exactly `prefix` in the sequence's cache; computed only where it is not there yet."""
        cached = self._cached[sequence]
        if cached[: len(prefix)] == prefix:
            self._forget(sequence, len(prefix))
            return
        self._forget(sequence, 0)
        self._prefill(sequence, prefix)

    def _forget(self, sequence: int, length: int) -> None:
        self._remove(sequence, length)
        self._cached[sequence] = self._cached[sequence][:length]

    def _remove(self, sequence: int, length: int) -> None:
        """From the cache: what stands behind the first `length` tokens."""
        self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def _prefill(self, sequence: int, ids: tuple[int, ...]) -> int:
        """The likeliest next token."""
        first, last = len(self._cached[sequence]), len(ids) - 1
        for start in range(0, len(ids), BATCH_TOKENS):
            chunk = ids[start : start + BATCH_TOKENS]
            self._decode_rows(
                [(sequence, token, first + start + i, start + i == last) for i, token in enumerate(chunk)]
            )
        self._cached[sequence] += ids
        return int(self._row(-1).argmax())

    def _decode(self, tokens: Sequence[tuple[int, int]]) -> list[int]:
        """One step: (sequence, token) pairs to the likeliest next tokens."""
        self._decode_rows([(sequence, token, len(self._cached[sequence]), True) for sequence, token in tokens])
        for sequence, token in tokens:
            self._cached[sequence] += (token,)
        return [int(self._row(i).argmax()) for i in range(len(tokens))]

    def _decode_rows(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """(sequence, token, position, wants logits)"""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (sequence, token, position, wants_logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wants_logits
            batch.seq_id[i][0] = sequence
        status = self._api.llama_decode(self._context, batch)
        assert status == 0, status
        self._api.llama_synchronize(self._context)

    def _row(self, index: int) -> np.ndarray:
        pointer = self._api.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,)).copy()


def import_llama_cpp():
    """The binding's module. Raises KimiLiteError with the way to get it."""
    try:
        import llama_cpp.llama_cpp as api
    except (ImportError, OSError, RuntimeError) as error:
        raise KimiLiteError(
            f"llama.cpp is wanted for comparison, and llama-cpp-python cannot be imported: {error}.",
            'Say: pip install "kimi-lite[ggml]".',
        ) from error
    return api
