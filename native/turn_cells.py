"""The int64 cells through which a GPU and a team of CPU threads take turns in a decode step, in memory that both see.

    GPU: x, X_POSTED[t] = n            | choices, CHOICES_POSTED[t] = n    | its own experts | waits: ANSWERED >= n
    CPU: waits for X_POSTED, quantizes | waits for CHOICES_POSTED, computes what has no slot | ANSWERED = n

A turn is one layer's; its number n grows from turn to turn and from step to step, so nothing is reset in between and a
CUDA graph can hold the GPU's half. What only the GPU writes and what only the CPU writes lie on different cache lines.
`native.gpu.turns` and `native.cpu.turns` are the two halves.
"""

MAX_TOKENS = 16  # of a step that is taken in turns
_LINE = 16  # cells: 128 bytes, which some CPUs fetch together

ANSWERED = 0  # written by the CPU: the last turn whose rows are there
GIVEN_UP = _LINE  # written by the GPU: a turn whose answer it waited for in vain
X_POSTED = 2 * _LINE  # and on, by token: written by the GPU
CHOICES_POSTED = X_POSTED + MAX_TOKENS
STOP = CHOICES_POSTED + _LINE  # written on the CPU: its threads stop waiting
NUM_CELLS = STOP + _LINE

EVERY_TURN = 1 << 62  # as ANSWERED: the GPU waits for none any more
