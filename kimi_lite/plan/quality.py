"""How much of a model's quality a type of its routed experts keeps: the one table, and the order of recipes by it.

Measured as KL divergence from the BF16 file, in nats: the demo model with its experts in each type and the rest in
Q8_0, 8 x 512 tokens of *Emma* (`python -m tools.quality.table`, README, tools/LOG.md of 2026-11-23). So small a model
suffers more than a trillion parameters do: the order is what counts. What `--calibrate` brings is counted only as
measured on text of another kind than the calibration's: on the same novel it looked twice as good as it is.
"""

from dataclasses import dataclass

from kimi_lite.arch.recipe import LOSSLESS


@dataclass(frozen=True, slots=True)
class Quality:
    """`kl_nats`: encoded with an importance matrix, by ggml's encoder or, where there is one, ours. None: not measured;
    better than every measured type if it has more bits. `calibrated_nats`: ours with `--calibrate`, on another kind of
    text than it was calibrated on."""

    kl_nats: float | None
    calibrated_nats: float | None = None


_UNKNOWN = Quality(None)
_MEASURED = {
    LOSSLESS: Quality(0.0),
    "q4_k": Quality(0.0102),
    "q4_0": Quality(0.0795),
    "q3_k": Quality(0.2022),
    "q2_k": Quality(0.4844),
    "iq2_xxs": Quality(0.9914),
    "q2_0": Quality(1.6885),
    "iq1_m": Quality(1.7094),
    "iq1_s": Quality(2.3895),
    "tq2_0": Quality(2.8964),
    "tq1_0": Quality(3.2506, 2.39),
}
# The same of the weights that every token uses, against Q8_0 (tools/LOG.md of 2026-11-29). Measured on the CPU, where a
# K type's activations are rounded more coarsely too; a GPU does not round them.
REST_NATS = {"q8_0": 0.0, "q6_k": 0.019, "q4_k": 0.028}


def quality_of(recipe: str) -> Quality:
    return _MEASURED.get(recipe, _UNKNOWN)


def loss_order(recipe: str, bits: float, is_exact: bool = False) -> tuple[float, float]:
    """A sort key, best first: what keeps every weight of its source, then the measured loss, then the bits of a weight.
    What was not measured has more bits than all that was, and so comes before it by its bits."""
    quality = quality_of(recipe)
    if is_exact or recipe == LOSSLESS:
        return (-2.0, -bits)
    return (-1.0, -bits) if quality.kl_nats is None else (quality.kl_nats, -bits)


def describe(recipe: str, is_exact: bool = False) -> str:
    """`0.484`, or `-` where it was not measured."""
    if is_exact:
        return "0"
    quality = quality_of(recipe)
    return "-" if quality.kl_nats is None else "0" if not quality.kl_nats else f"{quality.kl_nats:.3g}"
