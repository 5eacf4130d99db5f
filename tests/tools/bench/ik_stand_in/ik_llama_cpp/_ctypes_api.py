"""A scripted ik_llama.cpp: a cache that checks positions, and the same next token for the same tokens before it.

A model file whose name begins with "crash" ends the process at its first batch, one named "refused" is not loaded.
"""

import ctypes
import os
import sys
from types import SimpleNamespace

VOCAB = 32
_cells: dict[int, list[int]] = {}
_logits = (ctypes.c_float * VOCAB)()
_state = SimpleNamespace(model="", num_sequences=0, num_cells=0)


def llama_backend_init() -> None:
    print("a library's greeting, on the stdout that answers go through")


def llama_model_default_params():
    return SimpleNamespace(mla=0)


def llama_model_load_from_file(path: bytes, params) -> int | None:
    assert params.mla == 3
    _state.model = os.path.basename(path.decode())
    return None if _state.model.startswith("refused") else 1


def llama_context_default_params():
    return SimpleNamespace()


def llama_init_from_model(model: int, params) -> int:
    _state.num_sequences, _state.num_cells = params.n_seq_max, params.n_ctx
    assert params.n_threads == params.n_threads_batch and params.mla_attn == 3
    assert params.flash_attn == (params.n_seq_max == 1)  # the wheel ends in an assertion of its own otherwise
    return 2


def llama_model_get_vocab(model: int) -> int:
    return 3


def llama_vocab_n_tokens(vocab: int) -> int:
    return VOCAB


def llama_batch_init(capacity: int, embd: int, n_seq_max: int):
    numbers = [[0] * capacity for _ in range(4)]
    seq_id = [[0] * n_seq_max for _ in range(capacity)]
    names = ("token", "pos", "n_seq_id", "logits")
    return SimpleNamespace(n_tokens=0, seq_id=seq_id, **dict(zip(names, numbers, strict=True)))


def llama_decode(context: int, batch) -> int:
    if _state.model.startswith("crash"):
        print("ggml.c:12: GGML_ASSERT(false) failed", "[a trace]", sep="\n", file=sys.stderr, flush=True)
        os._exit(7)
    for i in range(batch.n_tokens):
        cells = _cells.setdefault(batch.seq_id[i][0], [])
        assert batch.pos[i] == len(cells), "positions follow each other"
        cells.append(batch.token[i])
    assert len(_cells) <= _state.num_sequences and sum(map(len, _cells.values())) <= _state.num_cells
    _state.last = batch.seq_id[batch.n_tokens - 1][0]
    return 0


def llama_get_logits_ith(context: int, index: int):
    cells = _cells[_state.last if index < 0 else index]
    ctypes.memset(_logits, 0, ctypes.sizeof(_logits))
    _logits[sum(cells) % VOCAB] = 1
    return ctypes.cast(_logits, ctypes.POINTER(ctypes.c_float))


def _remove(context: int, sequence: int, first: int, last: int) -> bool:
    assert last == -1
    del _cells.setdefault(sequence, [])[first:]
    return True


def _info() -> bytes:
    has_vnni = "native" in os.environ.get("IK_LLAMA_CPP_LIB_PATH", "")
    return f"AVX = 1 | AVX_VNNI = 0 | AVX2 = 1 | AVX512 = {has_vnni:d} | AVX512_VNNI = {has_vnni:d} | ".encode()


class _Function:
    """A function that takes the attributes of ctypes' functions."""

    def __init__(self, function) -> None:
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)


_lib = SimpleNamespace(
    llama_kv_cache_seq_rm=_Function(_remove),
    llama_synchronize=_Function(lambda context: None),
    llama_print_system_info=_Function(_info),
)
