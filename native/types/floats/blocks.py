"""Floats have no scales: `random_blocks` draws the numbers themselves."""

MAKERS = {"F32": None, "F16": None, "BF16": None}
