"""Codes below 2 bits against the rate-distortion bound: rate, distortion and decode speed, on Gaussian weights and on a
model's.

    python -m tools.quality.rates
    python -m tools.quality.rates -m demo-bf16.gguf --calibrate calibration.txt --held-out other.txt

An experiment: no file has the codes that are ours alone here. A row for each code:
- rate: bits a weight with all scales.
- Gaussian: mean squared error of independent normal weights of variance 1; the bound, which no code beats, is
  2^(-2 rate).
- With a model, of gate matrices of routed experts: |E|^2 / |W|^2 without feedback, and tr E H E^T / tr W H W^T of codes
  that were chosen with H = X^T X of one text, on that text's H and on another's.
- speed: 10^9 weights/s that one core decodes and multiplies, of CPU time, weights in its cache.

The codes: TQ1_0 (ours, with its feedback and descent), IQ1_M (ggml's encoder, importance alone), IQ1_KT's generator
(the nearest of 8,192 points, one of 8 scales for each 32 weights), TQ1_0 and its error's largest singular vectors in
eight bits, three levels learned for each row, and own trellises.

An own trellis is a string of bits in which every weight has a window. The window moves on by 1 or 2 bits a weight, by
13 for eight weights, so that a block of 256 with a float16 scale has TQ1_0's 54 bytes. A window of 6 bits is an index
into a table of 64 bytes; one of 12 bits is two, whose values are added: AVX-512 VBMI cuts 64 windows with one
instruction (vpmultishiftqb), looks them up with another (vpermb) and multiplies with a third (vpdpbusd). Tables are
learned (Lloyd); codes are found by a beam search in which every survivor has its own error feedback (trellis-coded
quantization: Marcellin and Fischer 1990; windows: QTIP, arXiv 2406.11235).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numba import njit

from kimi_lite.arch.tensors import open_model
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.types.sixteen_values.layout import IQ4_VALUES
from kimi_lite.native.types.trellis.reference import generated
from kimi_lite.quantize.calibrate.calibration import CalibrationText
from kimi_lite.quantize.codecs import encode
from kimi_lite.quantize.codecs.feedback import Curvature, encode_with_feedback
from kimi_lite.tools.quality.trellis_speed import decode_speed, stored_speed

BLOCK = 256
SCHEDULE = tuple(13 * (i + 1) // 8 - 13 * i // 8 for i in range(8))  # bits that the window moves on: 13 for 8 weights

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


class Coded(NamedTuple):
    """Decoded weights float32 (R, k), and what they took: bits a weight."""

    weights: np.ndarray
    rate: float


# weights float32 (R, k), Curvature or None -> Coded
Code = Callable[[np.ndarray, Curvature | None], Coded]


# Codes that there are -------------------------------------------------------------------------------------------------


def tq1_0(weights: np.ndarray, curvature: Curvature | None) -> Coded:
    layout = BY_NAME["TQ1_0"]
    rows = encode(layout, weights) if curvature is None else encode_with_feedback(layout, weights, curvature)
    return Coded(dequantize(rows, "TQ1_0"), layout.bits_per_weight)


def iq1_m(weights: np.ndarray, curvature: Curvature | None) -> Coded:
    layout = BY_NAME["IQ1_M"]
    importance = np.ones(weights.shape[1], np.float32) if curvature is None else np.diag(curvature.hessian).copy()
    return Coded(dequantize(encode(layout, weights, importance), "IQ1_M"), layout.bits_per_weight)


def low_rank(weights: np.ndarray, curvature: Curvature | None, rank: int = 4) -> Coded:
    """TQ1_0, and the largest singular vectors of its error, in the metric of the inputs, at 8 bits an entry."""
    base = tq1_0(weights, curvature)
    root = np.eye(weights.shape[1]) if curvature is None else np.linalg.cholesky(curvature.hessian.astype(np.float64))
    u, s, v = np.linalg.svd((weights - base.weights) @ root, full_matrices=False)
    correction = (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)
    num_rows, k = weights.shape
    return Coded((base.weights + correction).astype(np.float32), base.rate + 8 * rank * (num_rows + k) / (num_rows * k))


def row_levels(weights: np.ndarray, curvature: Curvature | None) -> Coded:
    """Three levels learned for each row (Lloyd), a float16 each, no scales of blocks; no feedback."""
    levels = weights.std(axis=1, keepdims=True) * np.array([-1.2, 0.0, 1.2], np.float32)  # (R, 3)
    for _ in range(12):
        nearest = np.abs(weights[:, :, None] - levels[:, None]).argmin(axis=2)
        for level in range(3):
            chosen = nearest == level
            counts = np.maximum(chosen.sum(axis=1), 1)
            levels[:, level] = (weights * chosen).sum(axis=1) / counts
    return Coded(np.take_along_axis(levels, nearest, axis=1), 1.6 + 3 * 16 / weights.shape[1])


# IQ1_KT's points ------------------------------------------------------------------------------------------------------

_TRIED = np.array([0.7, 0.8, 0.9, 1.0, 1.1], np.float32)


def iq1_kt(weights: np.ndarray, curvature: Curvature | None) -> Coded:
    """Groups of 8 columns in order; the error of each group is fed back to those after it, inside a group it is
    weighed exactly."""
    points = generated(np.arange(8192)[None], 8).reshape(8192, 8).astype(np.float32)
    scales = np.array([value for value in IQ4_VALUES if value > 0], np.float32)
    k = weights.shape[1]
    factor = np.eye(k, dtype=np.float32) if curvature is None else curvature.factor
    left, coded = weights.copy(), np.empty_like(weights)
    row_scale = np.sqrt(np.square(weights).mean(axis=1)) / (points.std() * 38)  # an ordinary group has scale 38
    for start in range(0, k, 32):
        rms = np.sqrt(np.square(left[:, start : start + 32]).mean(axis=1)) / points.std()
        best, least = None, np.full(len(weights), np.inf)
        for ratio in _TRIED:
            wanted = ratio * rms / row_scale
            scale = scales[np.abs(scales - wanted[:, None]).argmin(axis=1)] * row_scale
            tried, lost, cost = _coded_groups(left[:, start : start + 32], points, scale, factor, start)
            better = cost < least
            if best is None:
                best = [tried, lost]
            best[0][better], best[1][better], least[better] = tried[better], lost[better], cost[better]
        coded[:, start : start + 32] = best[0]
        left[:, start + 32 :] -= best[1] @ factor[start : start + 32, start + 32 :]
    return Coded(coded, BY_NAME["IQ1_KT"].bits_per_weight + 32 / k)


def _coded_groups(
    block: np.ndarray, points: np.ndarray, scale: np.ndarray, factor: np.ndarray, start: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """32 columns (R, 32): their codes, errors as feedback wants them, costs (R,)."""
    left, coded, lost = block.copy(), np.empty_like(block), np.empty_like(block)
    for first in range(0, 32, 8):
        own, at = slice(first, first + 8), slice(start + first, start + first + 8)
        inverse = np.linalg.inv(factor[at, at])
        target, turned = left[:, own] @ inverse / scale[:, None], points @ inverse  # (R, 8), (8192, 8)
        chosen = (np.square(turned).sum(axis=1) - 2 * target @ turned.T).argmin(axis=1)
        coded[:, own] = points[chosen] * scale[:, None]
        lost[:, own] = (left[:, own] - coded[:, own]) @ inverse
        left[:, first + 8 :] -= lost[:, own] @ factor[at, start + first + 8 : start + 32]
    return coded, lost, np.square(lost).sum(axis=1)


# Own trellises --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Trellis:
    """`values`: float32 (2^bits,), of each window. `num_tables`: for equal parts of it, whose entries are added."""

    bits: int
    num_tables: int
    values: np.ndarray

    @classmethod
    def learn(cls, bits: int, num_tables: int, num_blocks: int = 160, rounds: int = 10, beam: int = 24) -> "Trellis":
        """Tables that fit normal weights: values are the means of what they stand for, again and again."""
        rng = np.random.default_rng(1)
        blocks = rng.standard_normal((num_blocks, BLOCK)).astype(np.float32)
        size = 1 << bits // num_tables
        tables = np.stack([rng.permutation(_quantiles(size)) for _ in range(num_tables)]) / num_tables**0.5
        digits = (np.arange(1 << bits)[:, None] >> (bits // num_tables * np.arange(num_tables))) % size  # (2^bits, n)
        columns = digits + size * np.arange(num_tables)
        for _ in range(rounds):
            values = np.take_along_axis(tables.T, digits, axis=0).sum(axis=1).astype(np.float32)
            windows = _search(blocks, np.eye(BLOCK, dtype=np.float32), np.ones(num_blocks, np.float32), values, beam)[1]
            used = columns[windows.reshape(-1)]  # (N, n)
            normal, right = np.eye(size * num_tables) * 1e-3, np.zeros(size * num_tables)
            for i in range(num_tables):
                np.add.at(right, used[:, i], blocks.reshape(-1))
                for j in range(num_tables):
                    np.add.at(normal, (used[:, i], used[:, j]), 1.0)
            tables = np.linalg.solve(normal, right).reshape(num_tables, size)
        values = np.take_along_axis(tables.T, digits, axis=0).sum(axis=1).astype(np.float32)
        return cls(bits, num_tables, values)

    def code(self, weights: np.ndarray, curvature: Curvature | None, beam: int = 24) -> Coded:
        """Block after block; the error of each is fed back to those after it."""
        k = weights.shape[1]
        factor = np.eye(k, dtype=np.float32) if curvature is None else curvature.factor
        left, coded = weights.copy(), np.empty_like(weights)
        for start in range(0, k, BLOCK):
            own, after = slice(start, start + BLOCK), slice(start + BLOCK, k)
            block, part = np.ascontiguousarray(left[:, own]), np.ascontiguousarray(factor[own, own])
            scale = np.sqrt(np.square(block).mean(axis=1)).astype(np.float16).astype(np.float32)
            coded[:, own] = _search(block, part, np.maximum(scale, 1e-8), self.values, beam)[0]
            lost = np.linalg.solve(part.T, (left[:, own] - coded[:, own]).T).T
            left[:, after] -= (lost @ factor[own, after]).astype(np.float32)
        return Coded(coded, sum(SCHEDULE) / 8 + 16 / BLOCK)


def _quantiles(count: int) -> np.ndarray:
    """Of the normal distribution, from a large sorted sample."""
    sample = np.sort(np.random.default_rng(0).standard_normal(1 << 16))
    return sample[((np.arange(count) + 0.5) / count * len(sample)).astype(int)]


def _search(
    blocks: np.ndarray, factor: np.ndarray, scales: np.ndarray, values: np.ndarray, beam: int
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks float32 (R, 256) -> decoded weights (R, 256) and windows int32 (R, 256)."""
    decoded, windows = np.empty_like(blocks), np.empty(blocks.shape, np.int32)
    schedule = np.array(SCHEDULE * (BLOCK // 8), np.int32)
    _search_rows(blocks, factor, scales, values, schedule, beam, decoded, windows)
    return decoded, windows


@njit(fastmath=True, cache=False)
def _search_rows(blocks, factor, scales, values, schedule, beam, decoded, windows):
    num_rows, size = blocks.shape
    mask = len(values) - 1
    states, costs = np.zeros((2, beam), np.int32), np.zeros((2, beam), np.float32)
    carry = np.zeros((2, beam, size), np.float32)  # what feedback takes from each later weight
    parents, entered = np.zeros((size, beam), np.int32), np.zeros((size, beam), np.int32)
    found_cost, found = np.empty(4 * beam, np.float32), np.empty((4 * beam, 2), np.int32)
    for row in range(num_rows):
        scale, alive, now = scales[row], 1, 0
        states[0, 0], costs[0, 0] = 0, 0.0
        carry[0, 0] = 0.0
        for j in range(size):
            branches, inverse, count = 1 << schedule[j], 1 / factor[j, j], 0
            for i in range(alive):
                target = blocks[row, j] - carry[now, i, j]
                for bits in range(branches):
                    state = ((states[now, i] << schedule[j]) | bits) & mask
                    error = (target - scale * values[state]) * inverse
                    found_cost[count] = costs[now, i] + error * error
                    found[count, 0], found[count, 1] = i, state
                    count += 1
            order = np.argsort(found_cost[:count])
            kept, then = min(beam, count), 1 - now
            for place in range(kept):
                parent, state = found[order[place], 0], found[order[place], 1]
                error = (blocks[row, j] - carry[now, parent, j] - scale * values[state]) * inverse
                states[then, place], costs[then, place] = state, found_cost[order[place]]
                parents[j, place], entered[j, place] = parent, state
                for later in range(j + 1, size):
                    carry[then, place, later] = carry[now, parent, later] + error * factor[j, later]
            alive, now = kept, then
        place = 0
        for j in range(size - 1, -1, -1):
            windows[row, j] = entered[j, place]
            decoded[row, j] = scale * values[entered[j, place]]
            place = parents[j, place]


# The table ------------------------------------------------------------------------------------------------------------


_WIDTHS = (6, 9, 7, 8, 9, 9, 6)


class Candidate(NamedTuple):
    """`speed`: 10^9 weights/s, asked for when its row is printed; None where nothing decodes it here."""

    name: str
    code: Code
    speed: Callable[[], float | None]


def candidates() -> Iterator[Candidate]:
    for name, code in (("TQ1_0", tq1_0), ("IQ1_M", iq1_m), ("IQ1_KT", iq1_kt)):
        yield Candidate(name, code, lambda name=name: stored_speed(name))
    yield Candidate("TQ1_0 + rank 4", low_rank, lambda: None)
    yield Candidate("3 levels a row", row_levels, lambda: None)
    for num_tables in (1, 2):
        trellis = Trellis.learn(6 * num_tables, num_tables)
        name = f"trellis, {trellis.bits} bits"
        yield Candidate(name, trellis.code, lambda n=num_tables: decode_speed(SCHEDULE, n))


class Sample(NamedTuple):
    """A matrix of a model, with X^T X of the text that codes are chosen for and of another."""

    weights: np.ndarray
    gram: np.ndarray
    held_out: np.ndarray
    num_inputs: int


def samples(model: Path, text: Path, held_out: Path, layers: Sequence[int], chunks: int) -> list[Sample]:
    """The first expert's gate matrix of each layer."""
    names = {layer: f"blk.{layer}.ffn_gate_exps.weight" for layer in layers}
    (seen, num_inputs), (unseen, _) = (_grams(model, file, set(names.values()), chunks) for file in (text, held_out))
    store, _ = open_model(model)
    with closing(store):
        views = {name: store.tensor(name) for name in names.values()}
        weights = {name: dequantize(view.data[0], view.layout.name) for name, view in views.items()}
    return [Sample(weights[name], seen[name], unseen[name], num_inputs) for name in names.values()]


def _grams(model: Path, text: Path, names: set[str], chunks: int) -> tuple[dict[str, np.ndarray], int]:
    """X^T X (k, k) of the inputs that these tensors' experts share, and of how many tokens."""
    with closing(CalibrationText.open(model, text, chunks)) as opened:
        found: dict[str, np.ndarray] = {}

        def observe(inputs) -> None:
            for name in names.intersection(inputs.weights):
                products = inputs.values.T @ inputs.values
                found[name] = found.get(name, 0) + products.astype(np.float64)

        for _ in opened.walk.layers(opened.chunks, observe):
            if len(found) == len(names):
                break
        return found, sum(map(len, opened.chunks))


def _relative(errors: np.ndarray, weights: np.ndarray, gram: np.ndarray) -> float:
    lost, size = (float(np.einsum("ij,ij->", each @ gram, each)) for each in (errors, weights))
    return lost / size


@app.command()
def main(
    model: Annotated[Path | None, typer.Option("-m", "--model", help="A GGUF in bf16.", exists=True)] = None,
    calibrate: Annotated[Path | None, typer.Option(help="The text that codes are chosen for.", exists=True)] = None,
    held_out: Annotated[Path | None, typer.Option(help="Another text, of another kind.", exists=True)] = None,
    layers: Annotated[str, typer.Option(help="Whose first experts, comma-separated.")] = "5,15,25",
    chunks: Annotated[int, typer.Option(help="Of each text, 512 tokens each.", min=1)] = 32,
    rows: Annotated[int, typer.Option(help="Of 768 Gaussian weights.", min=1)] = 48,
) -> None:
    """Rate, distortion and decode speed of codes below 2 bits."""
    gaussian = np.random.default_rng(5).standard_normal((rows, 3 * BLOCK)).astype(np.float32)
    found: list[Sample] = []
    if model is not None:
        if calibrate is None or held_out is None:
            raise typer.BadParameter("A model needs --calibrate TEXT and --held-out TEXT.")
        found = samples(model, calibrate, held_out, [int(layer) for layer in layers.split(",")], chunks)
    heads = ("rate", "Gaussian", "bound", "weights", "feedback", "held out", "speed")
    print(f"{'code':16} " + " ".join(f"{head:>{width}}" for head, width in zip(heads, _WIDTHS, strict=True)))
    for each in candidates():
        coded = each.code(gaussian, None)
        distortion, bound = float(np.square(coded.weights - gaussian).mean()), 2 ** (-2 * coded.rate)
        on_model = _on_model(each.code, found) if found else (None, None, None)
        cells = zip(
            (coded.rate, distortion, bound, *on_model, each.speed()), _WIDTHS, (3, 4, 4, 4, 4, 4, 1), strict=True
        )
        shown = (f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}" for value, width, digits in cells)
        print(f"{each.name:16} " + " ".join(shown), flush=True)


def _on_model(code: Code, found: Sequence[Sample]) -> tuple[float, float, float]:
    """Relative errors, means over the samples: of weights, of outputs on the text of the codes, on the other."""
    values = []
    for sample in found:
        plain = code(sample.weights, None).weights - sample.weights
        fitted = code(sample.weights, Curvature.of(sample.gram, sample.num_inputs)).weights - sample.weights
        own = np.eye(len(sample.gram))
        values.append([_relative(plain, sample.weights, own)])
        values[-1] += [_relative(fitted, sample.weights, gram) for gram in (sample.gram, sample.held_out)]
    return tuple(float(value) for value in np.mean(values, axis=0))


if __name__ == "__main__":
    app()
