"""Compiles the kernels that take turns with the CPU for all GPUs, and looks at the order of memory in what comes out.

python -m tests.native.gpu.compile_turns    # a line for each; an error where something is missing
"""

import torch

from kimi_lite.native.gpu.arguments import Posting
from kimi_lite.native.gpu.router import route
from kimi_lite.native.gpu.turns import await_answer
from kimi_lite.native.turn_cells import MAX_TOKENS, NUM_CELLS
from kimi_lite.tools.kernels.launches import recorded

CAPABILITIES = (80, 86, 89, 90, 120)
STORE, LOAD = "st.release.sys.global.u64", "ld.acquire.sys.global.u64"
WANTED = {"route_kernel": (2, 0), "await_answer_kernel": (1, 2)}  # stores, loads


def main() -> None:
    cells, first = torch.zeros(NUM_CELLS, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    logits, slot_of = torch.zeros(3, 384), torch.zeros(384, dtype=torch.int32)
    host = torch.zeros((MAX_TOKENS, 8), dtype=torch.int32)
    posting = Posting(host, host, cells, first, 1)
    found = [
        *recorded(lambda: route(logits, logits[0], 8, slot_of=slot_of, posting=posting)),
        *recorded(lambda: await_answer(cells, first, first, 1)),
    ]
    for launch in found:
        for capability in CAPABILITIES:
            code, name = launch.compiled(capability).asm["ptx"], launch.kernel.__name__
            have = (code.count(STORE), code.count(LOAD))
            assert have == WANTED[name], (name, capability, have)
            assert "bar.sync" in code[: code.index(STORE)], name
            print(f"sm_{capability} {name}: {have[0]} stores with release, {have[1]} loads with acquire")


if __name__ == "__main__":
    main()
