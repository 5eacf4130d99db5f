"""A machine in one line of text, and how long a token of Kimi K2.5 takes there: bytes over bandwidth.

What matters to the choice between computing an expert on the CPU and copying it to the GPU: both read the same RAM. A
copy through pinned memory reads, writes and reads again (`copy_traffic` bytes of RAM traffic a byte), and takes a
core's time; only the link is its own.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_lite.arch.known import K2_5
from kimi_lite.errors import KimiLiteError

_PCIE_GB_S = {3: 11.8, 4: 23.5, 5: 47.0}  # of 16 lanes, pinned memory, measured by others
_DENSE_BITS, _WORK_GB, _CACHE_GB = 8.5, 2.0, 2.2  # on the GPU: all but routed experts; activations; 32K of context
_VRAM_GB_S, _OVERHEAD_S = 920.0, 0.001
_GWEIGHTS_PER_CORE = 47.0  # a second, TQ1_0 on AVX-512 at 2.6 GHz (tools.kernels)
COPY_GB_S_PER_CORE = 12.0  # into pinned memory
_STAGED = 3.0  # bytes of RAM traffic a byte copied: read, written, read by the GPU
_EXAMPLE = "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores"


class Work(NamedTuple):
    """What a token needs of experts: float64 (layers,) of the model, and what goes on behind all of them."""

    hits: np.ndarray  # computed on the GPU, found there
    misses: np.ndarray  # computed on the CPU
    uploads: np.ndarray  # copied to the GPU and computed there, while the layer waits
    promotions: float = 0.0  # copied while the token goes on


@dataclass(frozen=True, slots=True)
class Machine:
    """Bandwidths are what is really delivered, 10^9 bytes/s; `core_gweights_s`: 10^9 weights/s of experts' kernels."""

    vram_gb: float
    ram_gb_s: float
    num_cores: int
    pcie_gb_s: float = _PCIE_GB_S[4]
    vram_gb_s: float = _VRAM_GB_S
    core_gweights_s: float = _GWEIGHTS_PER_CORE
    copy_traffic: float = _STAGED

    @classmethod
    def parse(cls, text: str) -> "Machine":
        """`24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores`; `1000 GB/s VRAM`, `20 Gweights/s` (a core's) and `copies 1x`
        (bytes of RAM traffic a byte copied) may be added. Raises KimiLiteError."""
        patterns = {
            "vram_gb": r"(\d+(?:\.\d+)?) ?GB(?: VRAM)?",
            "ram_gb_s": r"(\d+(?:\.\d+)?) ?GB/s(?: RAM)?",
            "vram_gb_s": r"(\d+(?:\.\d+)?) ?GB/s VRAM",
            "num_cores": r"(\d+) ?cores",
            "core_gweights_s": r"(\d+(?:\.\d+)?) ?Gweights/s",
            "copy_traffic": r"copies (\d+(?:\.\d+)?)x",
        }
        found: dict[str, float] = {}
        for part in map(str.strip, text.split(",")):
            pcie = re.fullmatch(r"PCIe ?([345])(?:\.0)?(?: x(\d+))?", part, re.IGNORECASE)
            matches = {name: re.fullmatch(pattern, part, re.IGNORECASE) for name, pattern in patterns.items()}
            named = {name: float(match[1]) for name, match in matches.items() if match}
            if not pcie and not named:
                raise KimiLiteError(f"--machine has {part!r}.", f'Write it like "{_EXAMPLE}".')
            found |= {"pcie_gb_s": _PCIE_GB_S[int(pcie[1])] * int(pcie[2] or 16) / 16} if pcie else named
        if missing := {"vram_gb", "ram_gb_s", "num_cores"} - found.keys():
            raise KimiLiteError(
                f"--machine lacks {', '.join(sorted(missing))}.", "Name VRAM in GB, RAM in GB/s, and cores."
            )
        return cls(**{**found, "num_cores": int(found["num_cores"])})

    def num_slots(self, bits: float) -> int:
        """Experts that fit on the GPU with everything else."""
        dense_gb = K2_5.other_parameters * _DENSE_BITS / 8e9
        free_gb = max(0.0, self.vram_gb - dense_gb - _WORK_GB - _CACHE_GB)
        return min(K2_5.num_moe_layers * K2_5.num_experts, int(free_gb / expert_gb(bits)))

    def token_s(self, work: Work, bits: float) -> float:
        """The GPU's dense weights, then layer by layer both sides of the experts at the same time, copies too."""
        each_gb = expert_gb(bits)
        gpu_s = (work.hits + work.uploads) * each_gb / self.vram_gb_s
        layers_s = np.maximum(self.layers_s(work, bits), gpu_s)
        whole_s = _OVERHEAD_S + _dense_gb() / self.vram_gb_s + float(layers_s.sum())
        return max(whole_s, (float(work.uploads.sum()) + work.promotions) * each_gb / self.pcie_gb_s)

    def layers_s(self, work: Work, bits: float) -> np.ndarray:
        """Of each layer the CPU's experts and the uploads: bound by arithmetic, by the link, or by the RAM that both
        read."""
        each_gb, copies = expert_gb(bits), work.uploads + work.promotions / len(work.misses)
        core_gb_s = self.core_gweights_s * bits / 8
        cores_s = (work.misses / core_gb_s + copies / COPY_GB_S_PER_CORE) * each_gb / self.num_cores
        ram_s = (work.misses + self.copy_traffic * copies) * each_gb / self.ram_gb_s
        return np.maximum(np.maximum(cores_s, ram_s), work.uploads * each_gb / self.pcie_gb_s)


def expert_gb(bits: float) -> float:
    """Of one routed expert."""
    return K2_5.expert_parameters * bits / 8e9


def token_experts() -> int:
    """T: routed experts that a token uses, in all layers."""
    return K2_5.num_moe_layers * K2_5.num_experts_used


def _dense_gb() -> float:
    """That every token reads."""
    return (K2_5.active_parameters - token_experts() * K2_5.expert_parameters) * _DENSE_BITS / 8e9
