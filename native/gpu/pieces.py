"""How much a kernel's caller makes at a time. Without torch, as the planner counts the same bytes."""

DECODED_WEIGHTS = 64 << 20  # of a matrix, decoded for a product of many tokens: 128 MiB of bfloat16
