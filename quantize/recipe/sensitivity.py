"""How much of a model's words each tensor carries: the KL divergence that one coarse type does to it alone, as a table.

    sensitivity = read_sensitivity(Path("my-model.csv"))   # --sensitivity, written by --measure-sensitivity
    sensitivity = known_sensitivity(config)                # Kimi K2 to K2.6: kimi-k2.5.csv next to this file

A table has a row for each unit, one tensor or several that take a type together, joined by `+`:

    tensor,type,error,floor,kl
    blk.1.ffn_down_exps.weight,iq1_kt,0.1496,0.003142,0.004232

`kl`: nats, of the whole model with only this unit in `type`. `error`: the relative squared error that the type made
there. `floor`: nats that any change of this layer costs, however small: routing amplifies it, and a quantized model
pays it once whatever its types are. What a type with another error costs is taken as proportional above the floor,
since KL divergence is quadratic in small changes. Tables of the GGUF-Tool-Suite (`QTYPE,tensor,tensor,...`) are read
too; they have no floor.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kimi_lite import files
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME

_K2_5_TABLE = Path(__file__).with_name("kimi-k2.5.csv")
_COLUMNS = ("tensor", "type", "error", "floor", "kl")
_SUITE = "QTYPE"  # the first cell of a table of the GGUF-Tool-Suite
_LEAST_SHARE = 0.05  # of a divergence that counts, however near its floor: both were measured with noise
# Of tables that do not say it, on Gaussian weights: measured of ik_llama.cpp's encoders (tools/LOG.md of 2026-11-29),
# of others by their bits, within a factor of 1.6. The choice of types does not depend on it, the predicted divergence
# does.
_GAUSSIAN_ERRORS = {"iq1_kt": 0.1496, "iq2_kt": 0.0874}
_GAUSSIAN_FACTOR = 2.0
_HINT = "Make one with kimi-lite quantize MODEL.gguf TABLE.csv --measure-sensitivity TEXT."


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors, by their names in files, that take a type together, and what the probe's `type` did to them alone:
    relative squared `error`, `kl` nats, of which `floor` for any change."""

    tensors: tuple[str, ...]
    type: str
    error: float
    floor: float
    kl: float

    @property
    def slope(self) -> float:
        """Nats for an error of 1."""
        return max(self.kl - self.floor, _LEAST_SHARE * self.kl) / self.error


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """`label` says of what and by whom."""

    label: str
    units: tuple[Unit, ...]

    @property
    def floor(self) -> float:
        """Nats: what any change costs, once."""
        return max((unit.floor for unit in self.units), default=0.0)

    def check_names(self, names: Iterable[str], source: str) -> None:
        """Raises KimiLiteError where the table does not have all of these tensors."""
        known = {name for unit in self.units for name in unit.tensors}
        missing = [name for name in names if name not in known]
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise KimiLiteError(
                f"The sensitivities of {self.label} lack {len(missing)} tensors of experts of {source}: {some}.", _HINT
            )


def known_sensitivity(config: ModelConfig) -> Sensitivity | None:
    """Of a model with the dimensions of Kimi K2.5; None for others."""

    def dimensions(of: ModelConfig) -> tuple[object, ...]:
        return of.architecture, of.num_layers, of.hidden_size, of.num_experts, of.expert_feed_forward_size, of.num_heads

    return _k2_5() if dimensions(config) == dimensions(K2_5) else None


@cache
def _k2_5() -> Sensitivity:
    return read_sensitivity(_K2_5_TABLE, "Kimi K2.5")


def is_sensitivity(path: Path) -> bool:
    """Whether a file begins as a table of sensitivities."""
    text = files.read_text(path, "The table")
    first = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")
    return first.split(",")[0].strip() in (_COLUMNS[0], _SUITE)


def read_sensitivity(path: Path, label: str | None = None) -> Sensitivity:
    """Raises KimiLiteError where the file is missing or no such table."""
    if not path.is_file():
        raise KimiLiteError(f"There is no file {path}.", _HINT)
    lines = files.read_text(path, "The table of sensitivities").splitlines()
    try:
        rows = [(number, row) for number, row in enumerate(csv.reader(lines), 1) if row and not row[0].startswith("#")]
    except csv.Error as problem:  # a cell of more than 128 KiB, an open quote
        raise KimiLiteError(f"{path} is no table of sensitivities: {problem}.", _HINT) from problem
    if not rows:
        raise KimiLiteError(f"{path} is empty.", _HINT)
    (_, header), *rest = rows
    if header[0] == _SUITE:
        units = _suite_units(path, header, rest)
    elif tuple(header) == _COLUMNS:
        units = tuple(_unit(path, number, row) for number, row in rest)
    else:
        raise KimiLiteError(f"{path} does not begin with {','.join(_COLUMNS)} or {_SUITE},....", _HINT)
    names = [name for unit in units for name in unit.tensors]
    if not names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), "no tensor")
        raise KimiLiteError(f"{path} has {twice}{' twice' if names else ''}.", _HINT)
    return Sensitivity(label or path.name, units)


def write_sensitivity(path: Path, units: Sequence[Unit], remarks: Sequence[str]) -> None:
    """`remarks`: lines for a reader, such as what was measured and how."""
    with files.whole_file(path) as file:
        file.writelines(f"# {remark}\n" for remark in remarks)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for unit in units:
            numbers = (f"{value:.4g}" for value in (unit.error, unit.floor, unit.kl))
            writer.writerow(["+".join(unit.tensors), unit.type, *numbers])


def typical_error(type_name: str) -> float:
    """Relative squared error of a type on Gaussian weights."""
    name = type_name.lower()
    if name in _GAUSSIAN_ERRORS:
        return _GAUSSIAN_ERRORS[name]
    layout = BY_NAME.get(name.upper())
    if layout is None:
        raise KimiLiteError(f"There is no type {type_name!r}.", f"Tables name one of {', '.join(sorted(BY_NAME))}.")
    return _GAUSSIAN_FACTOR * 4.0**-layout.bits_per_weight


def _unit(path: Path, number: int, row: Sequence[str]) -> Unit:
    try:
        tensors, type_name, *cells = row
        error, floor, kl = map(float, cells)
    except ValueError as problem:
        raise KimiLiteError(f"{path}, line {number}: {','.join(_COLUMNS)} is needed.", _HINT) from problem
    is_sound = all(map(math.isfinite, (error, floor, kl))) and error > 0 and floor >= 0 and kl >= 0
    if not is_sound or not all(tensors.split("+")):
        raise KimiLiteError(
            f"{path}, line {number}: error {cells[0]}, floor {cells[1]}, kl {cells[2]}; need numbers from 0 on, "
            "and the error above it.",
            _HINT,
        )
    return Unit(tuple(tensors.split("+")), type_name.lower(), error, floor, kl)


def _suite_units(path: Path, header: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> tuple[Unit, ...]:
    """One row, a column a tensor, each in nats."""
    if len(rows) != 1 or len(rows[0][1]) != len(header):
        have = f"{len(rows)} rows" if len(rows) != 1 else f"{len(rows[0][1])} cells under {len(header)} names"
        raise KimiLiteError(f"{path} has {have}; one row with a value for each tensor is needed.", _HINT)
    number, (type_name, *values) = rows[0]
    error = str(typical_error(type_name))
    columns = zip(header[1:], values, strict=True)
    return tuple(_unit(path, number, (name, type_name, error, "0", value)) for name, value in columns)
