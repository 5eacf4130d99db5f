"""Experts' products with the bits that `native.cpu.experts` gives: an expert may move and the answer stays.

The rule is `native.cpu.dot`'s ("The order of sums"): int8 activations with a scale per 32 or 256, integer sums of
four, one order of float32 operations, and `native.cpu.vector_math`'s exponential. Kernels are launched without
contraction of a product and a sum into one operation; where the CPU has a fused one, `tl.fma` says so. Three steps:
activations become int8, gate and up with SwiGLU make float32 hidden values, and those, int8 again, go through down.

A thread has a lane of a row, both halves of 16: neighbouring threads read neighbouring words, blocks come one after
the other as on the CPU, and only the last sum exchanges anything. Choices are the grid's first axis: a prompt of 8,192
tokens has 65,536 of them, one more than CUDA allows on the others.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kimi_lite.native.cpu.activations import SMALLEST_PEAK
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.vector_math import EXP_COEFFICIENTS, LN2_HIGH, LN2_LOW, LOG2_E
from kimi_lite.native.gpu.formats import formats, table_for, weights_of
from kimi_lite.native.isa import sum_order
from kimi_lite.native.types.families import parts
from kimi_lite.native.types.gpu_parts import row_scale

_ROWS = 8  # of a program, 8 threads each
_GROUPS = {32: 16, 256: 4}  # groups that a program quantizes
_LOG2_E, _LN2_HIGH, _LN2_LOW = tl.constexpr(LOG2_E), tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(value) for value in EXP_COEFFICIENTS)
_SMALLEST_PEAK = tl.constexpr(SMALLEST_PEAK)
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off, it rounds to the nearest even integer


@triton.jit
def exact_exp(x):
    """`native.cpu.vector_math.exp_f32x16`, operation by operation."""
    x = tl.where(x < -87.0, -87.0, x)
    x = tl.where(x > 88.0, 88.0, x)
    n = (x * _LOG2_E + _TO_INTEGER) - _TO_INTEGER
    one = tl.zeros_like(x) + 1.0
    r = tl.fma(n, one * -_LN2_LOW, tl.fma(n, one * -_LN2_HIGH, x))
    p = tl.fma(one * _C0, r, one * _C1)
    p = tl.fma(p, r, one * _C2)
    p = tl.fma(p, r, one * _C3)
    p = tl.fma(p, r, one * _C4)
    p = tl.fma(p, r, one * _C5)
    value = tl.fma(p, r * r, r) + 1.0
    return value * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exact_swiglu(gate, up):
    """silu(gate) * up."""
    return tl.div_rn(gate, exact_exp(gate * -1.0) + 1.0) * up


@triton.jit
def halves_added(values, LANES: tl.constexpr):
    """(ROWS, LANES) -> (ROWS, LANES / 2): the upper half added to the lower one."""
    low, high = tl.split(tl.permute(tl.reshape(values, (values.shape[0], 2, LANES // 2)), (0, 2, 1)))
    return low + high


@triton.jit
def lanes_added(low, high, ROW_LANES: tl.constexpr):
    """The sum of 16 lanes, or of the first eight, as (ROWS,)."""
    total = low + high if ROW_LANES == 16 else low
    pairs = halves_added(halves_added(total, 8), 4)  # (ROWS, 2)
    first, second = tl.split(pairs)
    return first + second


@triton.jit
def exact_rows(
    base, x, codes, steps, sums, token, table, k, VALUES: tl.constexpr, KIND: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, HEADER: tl.constexpr, ROW_LANES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The rows at `base` (ROWS, 1) times the activations of one token -> float32 (ROWS,).

    KIND 0: float32 `x`; 32 and 256: int8 `codes` as words, `steps`, `sums` (`Quantized`).
    """
    lane, one = tl.arange(0, 8)[None, :], tl.zeros((1, 1), tl.int32)
    low, high = tl.zeros((base.shape[0], 8), tl.float32), tl.zeros((base.shape[0], 8), tl.float32)
    if KIND == 0:
        for column in range(0, k, 16):
            at = x + token * k + column + lane
            low = tl.fma(tl.load(base + column + lane).to(tl.float32), tl.load(at) + tl.zeros_like(low), low)
            high = tl.fma(tl.load(base + column + 8 + lane).to(tl.float32), tl.load(at + 8) + tl.zeros_like(low), high)
    else:
        words, its_steps, its_sums = codes + token * (k // 4), steps + token * (k // 32), sums + token * (k // 16)
        for first in range(0, k, 256):
            block, limit = base + HEADER + first // BLOCK_SIZE * BLOCK_BYTES, one + (k - first) // 32
            at, step, added = words + first // 4, its_steps + first // 32 + one, its_sums + first // 16
            value0 = VALUES(block, at, step, added, limit, lane, table, BIAS, 0)
            value1 = VALUES(block, at + 8, step, added, limit, lane, table, BIAS, 1)
            if KIND == 32:
                low, high = low + value0, high + value1
            else:
                scale = tl.load(step) + tl.zeros_like(low)
                if ROW_LANES == 8:
                    low = tl.fma(value0 + value1, scale, low)
                else:
                    low, high = tl.fma(value0, scale, low), tl.fma(value1, scale, high)
    total = lanes_added(low, high, 16 if KIND != 256 else ROW_LANES)
    if HEADER > 0:
        total *= tl.reshape(row_scale(base, HEADER), (base.shape[0],))
    return total


@triton.jit
def quantize_kernel(x, codes, steps, sums, num_groups, x_stride, KIND: tl.constexpr, GROUPS: tl.constexpr):
    """Program (token, i): groups i * GROUPS and on of its activations, as `native.cpu.activations.quantize_group`."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]
    mask, place = group < num_groups, group * KIND + tl.arange(0, KIND)[None, :]
    value = tl.load(x + token * x_stride + place, mask, other=0.0)
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered as the floats are, NaN on top
    peak_bits = tl.max(bits, 1)[:, None]
    is_finite = peak_bits < 0x7F800000
    peak = tl.where(is_finite, peak_bits, 0).to(tl.float32, bitcast=True)
    peak = tl.where(peak < _SMALLEST_PEAK, 0.0, peak)
    divisor = tl.where(peak > 0.0, peak, 1.0)
    inverse = tl.where(peak > 0.0, tl.div_rn(tl.zeros_like(peak) + 127.0, divisor), 0.0)
    scaled = tl.where(is_finite, value, 0.0) * inverse
    code = ((scaled + _TO_INTEGER) - _TO_INTEGER).to(tl.int32)
    row = token * num_groups * KIND
    tl.store(codes + row + place, code.to(tl.int8), mask)
    step = tl.where(is_finite, tl.div_rn(peak, tl.zeros_like(peak) + 127.0), float("nan"))
    thirty_two = tl.arange(0, KIND // 32)[None, :]
    tl.store(steps + row // 32 + group * (KIND // 32) + thirty_two, step, mask & (thirty_two >= 0))
    by_16 = tl.sum(tl.reshape(code, (GROUPS, KIND // 16, 16)), 2)
    sixteen = tl.arange(0, KIND // 16)[None, :]
    tl.store(sums + row // 16 + group * (KIND // 16) + sixteen, by_16, mask & (sixteen >= 0))


@triton.jit
def gate_up_kernel(
    x, g_codes, g_steps, g_sums, u_codes, u_steps, u_sums, gate_data, up_data, hidden, gate_table, up_table,
    slot_of_choice, token_of_choice, num_rows, k, gate_offset, up_offset, gate_slot, up_slot, gate_stride, up_stride,
    G_VALUES: tl.constexpr, G_KIND: tl.constexpr, G_BLOCK_SIZE: tl.constexpr, G_BLOCK_BYTES: tl.constexpr,
    G_HEADER: tl.constexpr, G_ALIGN: tl.constexpr, U_VALUES: tl.constexpr, U_KIND: tl.constexpr,
    U_BLOCK_SIZE: tl.constexpr, U_BLOCK_BYTES: tl.constexpr, U_HEADER: tl.constexpr, U_ALIGN: tl.constexpr,
    ROW_LANES: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (choice, i): rows i * ROWS and on of hidden[choice]. Offsets and strides of data count units of ALIGN."""
    choice = tl.program_id(0)
    slot = tl.load(slot_of_choice + choice).to(tl.int64)
    if slot >= 0:
        token = tl.load(token_of_choice + choice).to(tl.int64)
        first = tl.program_id(1) * ROWS
        row = tl.minimum(first + tl.arange(0, ROWS), num_rows - 1)[:, None].to(tl.int64)
        gate_base = gate_data + (slot * gate_slot + gate_offset + row * gate_stride) * G_ALIGN
        up_base = up_data + (slot * up_slot + up_offset + row * up_stride) * U_ALIGN
        gate = exact_rows(
            gate_base, x, g_codes, g_steps, g_sums, token, gate_table, k, G_VALUES, G_KIND, G_BLOCK_SIZE,
            G_BLOCK_BYTES, G_HEADER, ROW_LANES, BIAS,
        )  # fmt: skip
        up = exact_rows(
            up_base, x, u_codes, u_steps, u_sums, token, up_table, k, U_VALUES, U_KIND, U_BLOCK_SIZE, U_BLOCK_BYTES,
            U_HEADER, ROW_LANES, BIAS,
        )  # fmt: skip
        at = first + tl.arange(0, ROWS)
        tl.store(hidden + choice.to(tl.int64) * num_rows + at, exact_swiglu(gate, up), at < num_rows)


@triton.jit
def down_kernel(
    hidden, codes, steps, sums, data, out, table, slot_of_choice, num_rows, k, out_stride, offset, slot_stride,
    row_stride, VALUES: tl.constexpr, KIND: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    HEADER: tl.constexpr, ALIGN: tl.constexpr, ROW_LANES: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (choice, i): rows i * ROWS and on of out[choice]."""
    choice = tl.program_id(0)
    slot = tl.load(slot_of_choice + choice).to(tl.int64)
    if slot >= 0:
        first = tl.program_id(1) * ROWS
        row = tl.minimum(first + tl.arange(0, ROWS), num_rows - 1)[:, None].to(tl.int64)
        base = data + (slot * slot_stride + offset + row * row_stride) * ALIGN
        total = exact_rows(
            base, hidden, codes, steps, sums, choice.to(tl.int64), table, k, VALUES, KIND, BLOCK_SIZE, BLOCK_BYTES,
            HEADER, ROW_LANES, BIAS,
        )  # fmt: skip
        at = first + tl.arange(0, ROWS)
        tl.store(out + choice.to(tl.int64) * out_stride + at, total, at < num_rows)


class Quantized(NamedTuple):
    """Activations as products take them: int8 codes as int32 words (T, k / 4), float32 scales, one per 32 (T, k / 32)
    whatever the kind, and int32 sums of each 16 codes (T, k / 16). Of kind 0 nothing is used."""

    codes: torch.Tensor
    steps: torch.Tensor
    sums: torch.Tensor


@cache
def _values() -> dict[str, object]:
    """name -> the function of `native.types.*.gpu_exact`."""
    return {name: values for part in parts("gpu_exact") for name, values in part.VALUES.items()}


def quantize(x: torch.Tensor, kind: int) -> Quantized:
    """x float32 (T, k), k a multiple of `kind`: 32 or 256; 0 makes nothing."""
    num_tokens, k = x.shape
    if kind == 0:
        return Quantized(x, x, x)
    assert x.dtype == torch.float32 and x.stride(1) == 1 and k % kind == 0, (x.dtype, x.stride(), k, kind)
    codes = torch.empty((num_tokens, k), dtype=torch.int8, device=x.device)
    steps = torch.empty((num_tokens, k // 32), dtype=torch.float32, device=x.device)
    sums = torch.empty((num_tokens, k // 16), dtype=torch.int32, device=x.device)
    groups = _GROUPS[kind]
    quantize_kernel[(num_tokens, triton.cdiv(k // kind, groups))](
        x, codes, steps, sums, k // kind, x.stride(0), KIND=kind, GROUPS=groups, num_warps=4, enable_fp_fusion=False
    )
    return Quantized(codes.view(torch.int32), steps, sums)


def _constants(name: str, prefix: str = "") -> dict:
    each = formats()[name]
    found = {
        "VALUES": _values()[name],
        "KIND": activation_kind(name),
        "BLOCK_SIZE": each.block_size,
        "BLOCK_BYTES": each.block_units,
        "HEADER": each.header_bytes,
        "ALIGN": each.align,
    }
    return {prefix + key: value for key, value in found.items()}


def exact_gate_up(
    x: torch.Tensor,
    slots: torch.Tensor,
    gate,
    up,
    slot_of_choice: torch.Tensor,
    token_of_choice: torch.Tensor,
    hidden: torch.Tensor,
) -> None:
    """silu(gate x) * up x of every choice's expert -> hidden float32 (n, rows); see `expert_choices`."""
    x = x.to(torch.float32).contiguous()
    kinds = {name: activation_kind(name) for name in (gate.layout_name, up.layout_name)}
    made = {kind: quantize(x, kind) for kind in dict.fromkeys(kinds.values())}
    g, u, slot_bytes, order = formats()[gate.layout_name], formats()[up.layout_name], slots.stride(0), sum_order()
    gate_up_kernel[(len(slot_of_choice), triton.cdiv(gate.num_rows, _ROWS))](
        x, *made[kinds[g.name]], *made[kinds[u.name]], weights_of(slots, g.name), weights_of(slots, u.name), hidden,
        table_for(g, slots), table_for(u, slots), slot_of_choice, token_of_choice, gate.num_rows, gate.k,
        g.units(gate.offset), u.units(up.offset), g.units(slot_bytes), u.units(slot_bytes), g.units(gate.row_bytes),
        u.units(up.row_bytes), **_constants(g.name, "G_"), **_constants(u.name, "U_"), ROW_LANES=order.row_lanes,
        BIAS=order.bias, ROWS=_ROWS, num_warps=_ROWS * 8 // 32, enable_fp_fusion=False,
    )  # fmt: skip


def exact_down(
    hidden: torch.Tensor, slots: torch.Tensor, down, slot_of_choice: torch.Tensor, out: torch.Tensor
) -> None:
    """Every choice's hidden values (n, k) times its expert's down -> out float32 (n, rows)."""
    each, order = formats()[down.layout_name], sum_order()
    made = quantize(hidden, activation_kind(each.name))
    down_kernel[(len(slot_of_choice), triton.cdiv(down.num_rows, _ROWS))](
        hidden, *made, weights_of(slots, each.name), out, table_for(each, slots), slot_of_choice, down.num_rows,
        down.k, out.stride(0), each.units(down.offset), each.units(slots.stride(0)), each.units(down.row_bytes),
        **_constants(each.name), ROW_LANES=order.row_lanes, BIAS=order.bias, ROWS=_ROWS, num_warps=_ROWS * 8 // 32,
        enable_fp_fusion=False,
    )  # fmt: skip
