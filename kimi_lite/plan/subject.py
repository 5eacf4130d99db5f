"""Which model a plan is about: a GGUF file, a checkpoint folder that is to be converted, or a model known by name.

For the last two a recipe says which types the weights will get.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_lite.arch.checkpoint import read_checkpoint_config
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5, KNOWN, find_known, moonvit_bytes, unknown_model
from kimi_lite.arch.recipe import named_recipe
from kimi_lite.arch.sizes import ModelSizes, sizes_of, store_sizes
from kimi_lite.arch.tensors import open_model, tensor_shapes
from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.probe import Hardware
from kimi_lite.options import Options
from kimi_lite.plan.plan import Plan, make_plan

# From fine to coarse. Those that need llama.cpp's library and an importance matrix are left out where nobody names a
# recipe.
RECIPES = (
    "q8_0",
    "q6_k",
    "q5_k",
    "q4_k",
    "q4_0",
    "q3_k",
    "q2_k",
    "q2_0",
    "tq2_0",
    "iq2_xxs",
    "iq1_m",
    "tq1_0",
    "iq1_s",
)
_SMALLER = ("deepseek-v3", "moonlight", "deepseek-v2-lite")
_LOSSLESS = "q4_0-lossless"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to plan for. `sizes` of a file that exists; else `config`, whose types a recipe chooses."""

    config: ModelConfig
    origin: str  # how the user names it: a path or a name
    sizes: ModelSizes | None = None
    vision_bytes: int = 0
    has_int4_experts: bool = False

    def sizes_in(self, recipe_name: str) -> ModelSizes:
        """The model in the types of a recipe. Raises KimiLiteError for an unknown one."""
        recipe, shapes = named_recipe(recipe_name), tensor_shapes(self.config)
        tensors = ((name, shape, recipe.choose(name, shape).layout) for name, shape in shapes.items())
        return sizes_of(self.config, tensors, self.vision_bytes)

    @property
    def path(self) -> Path | None:
        """Where it lies; None for a model that is only known by name."""
        path = Path(self.origin).expanduser()
        return path if path.exists() else None

    @property
    def is_checkpoint(self) -> bool:
        """A folder of weights that quantize can read."""
        return self.sizes is None and self.path is not None

    @property
    def recipes(self) -> tuple[str, ...]:
        """From fine to coarse."""
        return (_LOSSLESS, *(name for name in RECIPES if name != "q4_0")) if self.has_int4_experts else RECIPES


@dataclass(frozen=True, slots=True)
class Choice:
    """A recipe and its plan."""

    recipe: str
    plan: Plan


def find_subject(model: str | None, is_seeing: bool = True) -> Subject:
    """`model`: a path, a name such as kimi-k2.5, or None for that one. Raises KimiLiteError."""
    path = Path(model).expanduser() if model else None
    if path and path.exists():
        return _checkpoint(path, is_seeing) if (path / "config.json").is_file() else _gguf(path, is_seeing)
    known = find_known(model) if model else KNOWN["kimi-k2.5"]
    if known is None:
        raise unknown_model(model or K2_5.name)
    vision_bytes = known.vision_bytes if is_seeing else 0
    return Subject(
        known.config, model or "kimi-k2.5", vision_bytes=vision_bytes, has_int4_experts=known.has_int4_experts
    )


def choices(subject: Subject, hardware: Hardware, limits: Options) -> Iterator[Choice]:
    """Every recipe's plan, from fine to coarse."""
    for recipe in subject.recipes:
        yield Choice(recipe, make_plan(subject.sizes_in(recipe), hardware, limits))


def best_choice(candidates: list[Choice]) -> Choice:
    """The finest recipe that lies in memory whole and that quantize makes unaided; else the smallest that runs, else
    any."""
    from kimi_lite.quantize.codecs import OWN_TYPES

    unaided = [c for c in candidates if c.recipe == _LOSSLESS or c.recipe.upper() in OWN_TYPES]
    whole = [c for c in unaided if c.plan.verdict in ("fits", "tight")]
    running = [c for c in unaided if c.plan.verdict != "refused"]
    smallest = min(running or unaided, key=lambda choice: choice.plan.sizes.total_bytes)
    return whole[0] if whole else smallest


def smaller_model(hardware: Hardware, limits: Options) -> tuple[str, str] | None:
    """The largest other model of the family that lies in memory here, with its recipe."""
    for name in _SMALLER:
        for recipe in ("q4_0", "tq1_0"):
            context_length = min(limits.context_length or 0, KNOWN[name].config.context_length) or None
            plan = make_plan(
                find_subject(name).sizes_in(recipe), hardware, replace(limits, context_length=context_length)
            )
            if plan.verdict in ("fits", "tight"):
                return name, recipe
    return None


def _gguf(path: Path, is_seeing: bool) -> Subject:
    store, config = open_model(path)
    eyes = sorted(store.path.parent.glob("mmproj*.gguf")) if is_seeing else []
    vision_bytes = min((file.stat().st_size for file in eyes), default=0)
    return Subject(config, str(path), store_sizes(store, config, vision_bytes), vision_bytes)


def _checkpoint(folder: Path, is_seeing: bool) -> Subject:
    """From config.json alone: weights need not be there yet."""
    checkpoint = read_checkpoint_config(folder)
    config, scheme = checkpoint.config, checkpoint.object("quantization_config")
    is_int4 = scheme.get("quant_method") == "compressed-tensors"
    vision_bytes = moonvit_bytes(checkpoint.vision, config.hidden_size) if is_seeing else 0
    return Subject(config, str(folder), vision_bytes=vision_bytes, has_int4_experts=is_int4)


def check_recipe(subject: Subject, recipe: str | None) -> None:
    """Raises KimiLiteError where a recipe is named for a file that has its types already."""
    if recipe and subject.sizes:
        raise KimiLiteError(
            f"{subject.origin} is GGUF with {subject.sizes.label} already, and --recipe {recipe} is for what is "
            f"yet to be made.",
            "Leave --recipe out, or plan for the checkpoint or the model's name.",
        )
