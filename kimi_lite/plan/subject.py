"""Which model a plan is about: a GGUF file, a checkpoint folder that is to be converted, or a model known by name.

For the last two a recipe says which types the weights will get.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from kimi_lite.arch.checkpoint import read_checkpoint_config
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5, KNOWN, find_known, unknown_model
from kimi_lite.arch.moonvit import MoonViT, find_vision_file, has_tower, read_checkpoint_tower, read_vision_file
from kimi_lite.arch.recipe import LOSSLESS, OWN_TYPES, named_recipe
from kimi_lite.arch.sizes import ModelSizes, sizes_of, store_sizes
from kimi_lite.arch.tensors import OpenModel, open_model, tensor_shapes
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.machine import Hardware
from kimi_lite.options import Options
from kimi_lite.plan.codes import OWN_FORMAT, kept_recipes
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.quality import loss_order, quality_of
from kimi_lite.plan.types import Plan
from kimi_lite.units import gib

# From fine to coarse.
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

_BF16_BYTES = 2  # of a weight of a vision tower as it is published
_SMALL_RECIPE = "tq1_0"  # whose size is named for a model that is not here


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to plan for. `sizes` of a file that exists; else `config`, whose types a recipe chooses."""

    config: ModelConfig
    origin: str  # how the user names it: a path or a name
    sizes: ModelSizes | None = None
    vision_bytes: int = 0
    kept: tuple[str, ...] = ()  # recipes that write the codes of a checkpoint as they are, the one to take first
    tower: MoonViT | None = None  # whose weights `vision_bytes` are

    def sizes_in(self, recipe_name: str, rest: str | None = None) -> ModelSizes:
        """The model in the types of a recipe; `rest`: the type of all but the routed experts, where it is another.
        Raises KimiLiteError for an unknown one."""
        return _sizes_in(self.config, self.vision_bytes, self.tower, recipe_name, rest)

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
        if LOSSLESS in self.kept:
            return (LOSSLESS, *(name for name in RECIPES if name != "q4_0"))
        at = RECIPES.index("q2_0") + 1
        return (*RECIPES[:at], *(name for name in self.kept if name not in RECIPES), *RECIPES[at:])


@lru_cache(maxsize=64)  # a plan looks at every recipe several times
def _sizes_in(
    config: ModelConfig, vision_bytes: int, tower: MoonViT | None, recipe_name: str, rest: str | None
) -> ModelSizes:
    recipe, shapes = named_recipe(recipe_name), tensor_shapes(config)
    if rest:
        recipe = replace(recipe, rest=named_recipe(rest).experts)
    tensors = ((name, shape, recipe.choose(name, shape).layout) for name, shape in shapes.items())
    return sizes_of(config, tensors, vision_bytes, tower)


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """A recipe and its plan."""

    recipe: str
    plan: Plan
    is_exact: bool = False  # it keeps the experts as the source has them

    @property
    def loss_order(self) -> tuple[float, float]:
        return loss_order(self.recipe, self.plan.sizes.expert_bits, self.is_exact)

    @property
    def needs_ggml(self) -> bool:
        """Whether quantize encodes it with ggml's library, which `pip install 'kimi-lite[ggml]'` brings."""
        return self.recipe != LOSSLESS and self.recipe.upper() not in OWN_TYPES


def find_subject(model: str | None, has_vision: bool = True, mmproj: Path | None = None) -> Subject:
    """`model`: a path, a name such as kimi-k2.5, or None for that one; mmproj: the vision file, where it is named.
    Raises KimiLiteError."""
    path = Path(model).expanduser() if model else None
    if path and path.exists():
        return _checkpoint(path, has_vision) if (path / "config.json").is_file() else _gguf(path, has_vision, mmproj)
    known = find_known(model) if model else KNOWN["kimi-k2.5"]
    if known is None:
        raise unknown_model(model or K2_5.name)
    of_vision, tower = (known.vision_bytes, known.tower) if has_vision else (0, None)
    kept = (LOSSLESS,) if known.has_int4_experts else ()
    return Subject(known.config, model or "kimi-k2.5", vision_bytes=of_vision, kept=kept, tower=tower)


def plan_in(subject: Subject, recipe: str, hardware: Hardware, limits: Options, rest: str | None = None) -> Plan:
    """The plan of a model that is still to be made in this recipe: its file must find place on the disk."""
    sizes = subject.sizes_in(recipe, rest)
    return make_plan(sizes, hardware, limits, file_bytes=sizes.total_bytes)


def choices(subject: Subject, hardware: Hardware, limits: Options, rest: str | None = None) -> Iterator[RecipePlan]:
    """Every recipe's plan, from fine to coarse."""
    for recipe in subject.recipes:
        yield RecipePlan(recipe, plan_in(subject, recipe, hardware, limits, rest), recipe in subject.kept)


def best_choice(candidates: Sequence[RecipePlan]) -> RecipePlan:
    """The recipe that loses least among those that lie in memory whole; else the smallest that runs, else the
    smallest."""
    whole = [choice for choice in candidates if choice.plan.verdict in ("fits", "tight")]
    if whole:
        return min(whole, key=lambda choice: choice.loss_order)
    running = [choice for choice in candidates if choice.plan.verdict != "refused"]
    return min(running or candidates, key=lambda choice: choice.plan.sizes.total_bytes)


def explain_choice(candidates: Sequence[RecipePlan], chosen: str) -> str:
    """Why a recipe was taken where none was named, and what making it needs: a sentence."""
    choice = next(each for each in candidates if each.recipe == chosen)
    if choice.plan.verdict == "refused":
        reason = "the smallest"
    elif choice.plan.verdict == "from disk":
        reason = "none fits into memory; the smallest reads least from disk"
    elif choice.is_exact:
        own = "; only kimi-lite reads this type" if chosen == OWN_FORMAT else ""
        reason = f"it fits and keeps the experts as they are{own}"
    else:
        reason = "the least loss of quality among those that fit"
    needs = " To make it: pip install 'kimi-lite[ggml]' and an importance matrix." if choice.needs_ggml else ""
    return f"{chosen}: {reason}.{needs}{_calibrated(candidates, choice)}"


def _calibrated(candidates: Sequence[RecipePlan], chosen: RecipePlan) -> str:
    """A recipe that loses less than the chosen one when it is made with --calibrate."""
    loss = quality_of(chosen.recipe).kl_nats
    if not loss:
        return ""
    better = [
        (quality_of(choice.recipe).calibrated_nats, choice.recipe)
        for choice in candidates
        if choice.plan.verdict in ("fits", "tight") and (quality_of(choice.recipe).calibrated_nats or loss) < loss
    ]
    return (
        f" With --calibrate, which takes hours, {min(better)[1]} loses less ({min(better)[0]:.2f})." if better else ""
    )


def smaller_model(hardware: Hardware, limits: Options) -> str:
    """Flags that name the largest other model of the family that lies in memory here, and on the disk, in its best
    recipe; empty where there is none."""
    for name in _SMALLER:
        model_context = KNOWN[name].config.context_length
        wanted = replace(limits, context_length=min(limits.context_length or 0, model_context) or None)
        best = best_choice(list(choices(find_subject(name), hardware, wanted)))
        if best.plan.verdict in ("fits", "tight"):
            context = f" -c {best.plan.context_length}" if limits.context_length is not None else ""
            return f"-m {name} --recipe {best.recipe}{context}"
    return ""


def file_subject(model: OpenModel, origin: str, vision_bytes: int = 0, tower: MoonViT | None = None) -> Subject:
    """A file whose header was read."""
    sizes = store_sizes(model.store, model.config, vision_bytes, tower)
    return Subject(model.config, origin, sizes, vision_bytes, tower=tower)


def _gguf(path: Path, has_vision: bool, mmproj: Path | None) -> Subject:
    model = open_model(path)
    return file_subject(model, str(path), *(vision_of(model.store, model.config, mmproj) if has_vision else ()))


def vision_of(store: GGUFStore, config: ModelConfig, mmproj: Path | None) -> tuple[int, MoonViT | None]:
    """Bytes of the weights in the vision file of an open model, and their tower; 0 and None where it has none."""
    file = find_vision_file(store.path, config.hidden_size, mmproj)
    if file is None:
        return 0, None
    opened = GGUFStore.open(file)
    return opened.total_bytes, read_vision_file(opened).tower


def _checkpoint(folder: Path, has_vision: bool) -> Subject:
    """From config.json alone: weights need not be there yet."""
    checkpoint = read_checkpoint_config(folder)
    config = checkpoint.config
    can_see = has_vision and has_tower(checkpoint.outer)
    tower = read_checkpoint_tower(folder)[0] if can_see else None
    of_vision = _BF16_BYTES * tower.num_weights if tower else 0
    return Subject(config, str(folder), vision_bytes=of_vision, kept=kept_recipes(checkpoint), tower=tower)


def check_recipe(subject: Subject, recipe: str | None) -> None:
    """Raises KimiLiteError where a recipe is named for a file that has its types already."""
    if recipe and subject.sizes:
        raise KimiLiteError(
            f"{subject.origin} has its types already ({subject.sizes.label}); {recipe} is for a model that is still "
            "to be made.",
            "Remove --recipe, or plan for the checkpoint or the model's name.",
        )


def require_no_bare_name(name: str) -> None:
    """Raises KimiLiteError for the name of a model, as `plan` takes it, in place of a file."""
    if Path(name).expanduser().exists():
        return
    alias = name.rpartition("/")[2].lower()
    known = find_known(alias)
    if known is None:
        return
    size = gib(find_subject(alias, has_vision=False).sizes_in(_SMALL_RECIPE).total_bytes)
    repository = name if "/" in name else "OWNER/REPO"
    raise KimiLiteError(
        f"{name} names {known.config.name}, {known.config.total_parameters / 1e9:,.0f} G parameters; -m wants its file "
        f"or folder.",
        f"1. kimi-lite plan -m {alias}: what of it would run here.\n"
        f"2. Download a GGUF of it, or its checkpoint: kimi-lite pull {repository} lists what there is.\n"
        f"3. kimi-lite quantize FOLDER {alias}.gguf --recipe {_SMALL_RECIPE} makes {size} of the checkpoint, then "
        f"-m {alias}.gguf.",
    )
