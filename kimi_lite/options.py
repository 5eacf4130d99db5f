"""How a model is to be loaded: what the command line, the server and the benchmark ask of `Engine.open`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """None: not said, so the program chooses. Sizes are limits, never wishes: a plan that breaks them is refused."""

    context_length: int | None = None  # tokens; 0: as many as the model was made for
    num_threads: int | None = None
    kv_dtype: str = "f16"
    device: str | None = None  # a torch device; None: CUDA where there is one
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    loading: str = (
        "map"  # of experts that fit into RAM: "map", "read" (into memory of our own), "lock" (and keep it there)
    )
    routing_trace: Path | None = None  # where the chosen experts of every token are recorded
    prefix_folder: Path | None = None  # where cached prefixes outlive the process; None: they do not
    prefix_bytes: int | None = None  # how large the folder may become
    cache_bias: float = 0.0  # added to the router's choice for experts that are resident; 0: never
    num_gpu_experts: int | None = None  # slots in VRAM for routed experts
    dense_type: Literal["q8_0", "bf16", "file"] = "q8_0"  # of the weights that every token uses, on a GPU
