"""Which experts deserve a slot: recency and frequency, both with decay. Pure bookkeeping: no memory, no files, no
threads.

One instance rules over the slots of one place: rows of a GPU tensor, or of the expert cache in RAM; `tools.cache`
replays routing traces through the very same class. An expert's score estimates how likely the next token wants it:

    score = w2 a(2 tokens) + w32 a(32) + w512 a(512),   a(h) = moving average of "was chosen", half of it forgotten
                                                               every h tokens

The short averages follow the topic almost as LRU does, the long one knows favourites and keeps a cache that is too
small for LRU from turning over for nothing (`tools.cache` compares; tools/cache/README.md has the numbers). A slot is
free, loading (given to an expert whose bytes are on their way) or resident, and a resident or loading slot may be
pinned, which protects it from eviction while a kernel or a copy uses it. A slot that is lent belongs to no expert.

    slots = policy.find(layer, ids)            # -1 where the expert is not resident
    slot = policy.admit(layer, [17])[0]        # may evict the coldest; -1 when every slot is pinned or loading
    policy.commit(slot)                        # the bytes have come; `abort` when they have not

Two ways to fill. In RAM what is missed must come in at once (`admit`), so every layer has its share of the slots:
without, the layers of one token would flush each other's experts wherever the slots hold little more than a token
needs. In VRAM a miss is computed elsewhere and a swap is a choice (`promotions`): only those are made that bring more
hits than their copies cost, whichever layers they are of. How many hits a difference of scores brings is counted: some
time after each swap, how often was the newcomer chosen, and how often what it has replaced?
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HALF_LIVES = (2.0, 32.0, 512.0)  # tokens
AT_ONCE_WEIGHTS = (1.0, 1.0, 1.0)  # of the averages, where what is missed comes in
SWAP_WEIGHTS = (0.3, 1.0, 1.0)  # and where it must repay a copy: what was used just now is not worth one yet
LEAST_GAIN = 0.5  # hits: below, no swap is worth the books
_REBASE_EXPONENT = 200.0  # gains grow as 2^(step / half-life); past this they start over
_JUDGED_AFTER, _JUDGEMENT_HALF_LIFE = 32.0, 512.0  # tokens: when a swap is judged, and how long that is remembered
_BEFORE_ANY = 20.0  # swaps of the usual kind that are taken for granted before any was judged:
_USUAL_SCORE, _USUAL_HITS = 0.2, 4.0  # the difference of scores and the hits of one (`tools.cache`)
_FREE, _LOADING, _RESIDENT, _LENT = range(4)


class Promotion(NamedTuple):
    """An expert that deserves `slot` more than what is in it (or it is free). Nothing has happened yet: see `begin`."""

    layer: int
    expert: int
    slot: int
    score: float = 0.0  # how much higher than that of what is in the slot


class _Swap(NamedTuple):
    """A promotion that began, and how often both experts had been chosen by then."""

    step: float
    key: int
    evicted: int  # -1: the slot was free
    score: float
    uses: float
    evicted_uses: float


class HeatPolicy:
    """Slots 0 .. num_slots - 1 over the experts of layers 0 .. num_layers - 1 (dense layers are simply never
    touched)."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        half_lives: tuple[float, ...] = HALF_LIVES,
        weights: tuple[float, ...] = AT_ONCE_WEIGHTS,
        num_sharing: int = 0,
    ) -> None:
        """half_lives: tokens after which a use counts half; one moving average for each, with its weight in the score.

        num_sharing: layers that `admit` gives equal shares of the slots; 0: none has a share.
        """
        assert min(num_layers, num_experts) > 0 and num_slots >= 0, (num_layers, num_experts, num_slots)
        self.num_experts, self.half_lives = num_experts, half_lives
        self._weights = weights
        self._share = num_slots // num_sharing if num_sharing else None
        self._rates = [1 - 2 ** (-1 / half_life) for half_life in half_lives]
        self._bases = [0.0] * len(half_lives)  # the step at which a gain is 1
        self._heat = np.zeros(
            (len(half_lives), num_layers * num_experts)
        )  # (H, L * E), inflated by 2^((step - base) / h)
        self._step = 0.0
        self._slot_of = np.full(num_layers * num_experts, -1, np.int32)  # resident or loading
        self._key_of = np.full(num_slots, -1, np.int64)
        self._state = np.full(num_slots, _FREE, np.int8)
        self._pins = np.zeros(num_slots, np.int32)
        self._free = list(range(num_slots - 1, -1, -1))  # low numbers go first
        self._held = np.zeros(num_layers, np.int64)  # slots of each layer
        self._uses = np.zeros(num_layers * num_experts)  # choices since the start
        self._swaps: deque[_Swap] = deque()  # not judged yet, oldest first
        self._num_judged = self._judged_hits = self._judged_score = 0.0  # sums, fading

    def touch(self, step: float, layer: int, expert_ids: np.ndarray | Sequence[int]) -> None:
        """These experts were chosen at `step` (tokens so far, never going back); repeats count, ids below 0 do not.

        expert_ids: of one token; or (T, K) of T tokens that follow each other, of which the last is at `step`.
        """
        self._advance(step)
        ids = np.atleast_2d(np.asarray(expert_ids, np.int64))  # (T, K)
        is_chosen = ids.reshape(-1) >= 0
        chosen = ids.reshape(-1)[is_chosen]
        ages = np.repeat(np.arange(len(ids) - 1, -1, -1.0), ids.shape[1])[is_chosen]
        row = slice(layer * self.num_experts, (layer + 1) * self.num_experts)
        self._uses[row] += np.bincount(chosen, minlength=self.num_experts)
        for i, (half_life, rate) in enumerate(zip(self.half_lives, self._rates, strict=True)):
            counts = np.bincount(chosen, 2 ** (-ages / half_life), self.num_experts)
            self._heat[i, row] += counts * (rate * 2 ** ((self._step - self._bases[i]) / half_life))

    def _advance(self, step: float) -> None:
        passed = max(0.0, float(step) - self._step)
        self._step += passed
        for i, half_life in enumerate(self.half_lives):
            exponent = (self._step - self._bases[i]) / half_life
            if exponent > _REBASE_EXPONENT:
                self._heat[i] *= 2**-exponent
                self._bases[i] = self._step
        if passed and self._num_judged:
            kept = 2 ** (-passed / _JUDGEMENT_HALF_LIFE)
            self._num_judged, self._judged_hits = kept * self._num_judged, kept * self._judged_hits
            self._judged_score *= kept
        while self._swaps and self._step - self._swaps[0].step >= _JUDGED_AFTER:
            self._judge(self._swaps.popleft())

    def _judge(self, swap: _Swap) -> None:
        """How many hits it has brought: the newcomer's choices less those of what it has replaced."""
        hits = self._uses[swap.key] - swap.uses
        if swap.evicted >= 0:
            hits -= self._uses[swap.evicted] - swap.evicted_uses
        self._num_judged += 1
        self._judged_hits += hits
        self._judged_score += swap.score

    def forget_swaps(self) -> None:
        """Those not judged yet never are: a prompt came, and what it wants is no guide to decoding."""
        self._swaps.clear()

    @property
    def hits_per_promotion(self) -> float:
        """As the last ones have brought, until they were judged."""
        usual = _BEFORE_ANY * _USUAL_HITS
        return max(0.0, usual + self._judged_hits) / (_BEFORE_ANY + self._num_judged)

    @property
    def hits_per_score(self) -> float:
        """That a difference of 1 between newcomer and replaced has brought."""
        usual_hits, usual_score = _BEFORE_ANY * _USUAL_HITS, _BEFORE_ANY * _USUAL_SCORE
        ratio = (usual_hits + self._judged_hits) / (usual_score + self._judged_score)
        return float(np.clip(ratio, 0.1 * usual_hits / usual_score, 10 * usual_hits / usual_score))

    def scores(self, keys: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Scores now of flat keys (layer * num_experts + expert), float64; all of them by default."""
        forms = zip(self._bases, self.half_lives, self._weights, strict=True)
        factors = [weight * 2 ** (-(self._step - base) / h) for base, h, weight in forms]
        return sum(factor * heat[keys] for factor, heat in zip(factors, self._heat, strict=True))

    def export_heat(self) -> np.ndarray:
        """float32 (H, L, E): the averages as they are now, for the next start."""
        factors = [2 ** (-(self._step - base) / h) for base, h in zip(self._bases, self.half_lives, strict=True)]
        return (self._heat * np.array(factors)[:, None]).astype(np.float32).reshape(len(factors), -1, self.num_experts)

    def import_heat(self, heat: np.ndarray) -> None:
        """What `export_heat` gave, as of now. The shape must be this policy's."""
        assert heat.size == self._heat.size and (heat >= 0).all(), heat.shape
        self._heat = heat.reshape(self._heat.shape).astype(np.float64)
        self._bases = [self._step] * len(self.half_lives)

    def hottest(self, count: int) -> list[tuple[int, int]]:
        """Up to `count` (layer, expert) that have heat, hottest first."""
        scores = self.scores()
        order = np.argsort(-scores, kind="stable")[:count]
        return [divmod(int(key), self.num_experts) for key in order if scores[key] > 0]

    @property
    def num_slots(self) -> int:
        return len(self._state)

    @property
    def num_resident(self) -> int:
        return int((self._state == _RESIDENT).sum())

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_slots(self) -> list[int]:
        """In the order in which they are given away."""
        return self._free[::-1]

    def find(self, layer: int, expert_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """int32 slots of resident experts, in the shape of the ids; -1 for those that are not (yet) there and for ids
        below 0."""
        ids = np.asarray(expert_ids, np.int64)
        slots = self._slot_of[np.maximum(ids, 0) + layer * self.num_experts]
        is_there = (ids >= 0) & (slots >= 0)
        return (
            np.where(is_there & (self._state[slots] == _RESIDENT), slots, -1)
            if len(self._state)
            else np.full_like(slots, -1)
        )

    def loading_slot(self, layer: int, expert: int) -> int:
        """The slot to which the expert is being brought; -1 if it is not on its way."""
        slot = int(self._slot_of[layer * self.num_experts + expert])
        return slot if slot >= 0 and self._state[slot] == _LOADING else -1

    def is_absent(self, layer: int, expert: int) -> bool:
        """Neither resident nor on its way."""
        return bool(self._slot_of[layer * self.num_experts + expert] < 0)

    def key(self, slot: int) -> tuple[int, int] | None:
        """The (layer, expert) that a slot is given to."""
        key = int(self._key_of[slot])
        return None if key < 0 else divmod(key, self.num_experts)

    def residents(self, layer: int) -> np.ndarray:
        """bool (E,): which experts of a layer are resident."""
        slots = self._slot_of[layer * self.num_experts : (layer + 1) * self.num_experts]
        return (slots >= 0) & (self._state[slots] == _RESIDENT) if len(self._state) else slots >= 0

    def is_pinned(self, slot: int) -> bool:
        return bool(self._pins[slot])

    def pin(self, slots: np.ndarray | Sequence[int]) -> None:
        """Protects slots from eviction until as many `unpin`; -1 is skipped."""
        self._count_pins(slots, 1)

    def unpin(self, slots: np.ndarray | Sequence[int]) -> None:
        self._count_pins(slots, -1)
        assert (self._pins >= 0).all(), self._pins.min()

    def _count_pins(self, slots: np.ndarray | Sequence[int], change: int) -> None:
        flat = np.asarray(slots, np.int64).reshape(-1)
        flat = flat[flat >= 0]
        assert (self._key_of[flat] >= 0).all(), flat
        np.add.at(self._pins, flat, change)

    def _victim_mask(self) -> np.ndarray:
        return (self._state == _RESIDENT) & (self._pins == 0)

    def choose_victims(self, count: int) -> list[int]:
        """The coldest unpinned resident slots, coldest first: at most `count`."""
        return self._coldest(np.flatnonzero(self._victim_mask()), count)

    def _coldest(self, slots: np.ndarray, count: int) -> list[int]:
        scores = self.scores(self._key_of[slots])
        if len(slots) > 4 * count:
            few = np.argpartition(scores, count)[:count]
            slots, scores = slots[few], scores[few]
        return slots[np.argsort(scores, kind="stable")][:count].tolist()

    def _victims_for(self, layer: int, count: int) -> list[int]:
        """Slots to give to experts of a layer, in that order: its own if it has its share, else of layers that have
        more than theirs; the coldest of all where those do not suffice."""
        if self._share is None:
            return self.choose_victims(count)
        is_victim, holders = self._victim_mask(), self._key_of // self.num_experts
        is_due = holders == layer if self._held[layer] >= self._share else self._held[holders] > self._share
        found = self._coldest(np.flatnonzero(is_victim & is_due), count)
        if len(found) < count:
            found += self._coldest(np.flatnonzero(is_victim & ~is_due), count - len(found))
        return found

    def admit(self, layer: int, expert_ids: Sequence[int], max_score: float = np.inf) -> list[int]:
        """Gives each of these absent experts a slot, free ones first, then those of the coldest: loading from now on.

        -1 from where on no expert is left to evict whose score is at most `max_score`.
        """
        num_victims = max(0, len(expert_ids) - len(self._free))
        victims = self._victims_for(layer, num_victims) if num_victims else []
        slots = []
        for expert in expert_ids:
            slot = self._free[-1] if self._free else victims.pop(0) if victims else -1
            if slot >= 0 and self._state[slot] == _RESIDENT and self.scores(self._key_of[[slot]])[0] > max_score:
                slot, victims = -1, []
            if slot >= 0:
                self.begin(layer, int(expert), slot)
            slots.append(slot)
        return slots

    def promotions(self, budget: int, least_gain: float = LEAST_GAIN) -> list[Promotion]:
        """Up to `budget` absent experts that would serve better than what is in the slots, hottest first.

        least_gain: hits that a swap must be expected to bring, which is what its copy costs.
        """
        scores = np.where(self._slot_of < 0, self.scores(), 0.0)
        budget = min(budget, len(scores))
        if budget <= 0:
            return []
        hot = np.argpartition(-scores, budget - 1)[:budget]
        hot = hot[np.argsort(-scores[hot], kind="stable")]
        hot = hot[scores[hot] > 0]
        free = self.free_slots[: len(hot)]
        victims = self.choose_victims(len(hot) - len(free)) if len(hot) > len(free) else []
        slots = np.array([*free, *victims], np.int64)
        hot = hot[: len(slots)]
        replaced = np.where(self._key_of[slots] >= 0, self.scores(self._key_of[slots]), 0.0)
        gained = scores[hot] - replaced  # falls, as the hottest take the place of the coldest
        num_worth_it = int((gained * self.hits_per_score > least_gain).sum())
        return [
            Promotion(*divmod(key, self.num_experts), slot, gain)
            for key, slot, gain in zip(hot.tolist(), slots.tolist(), gained.tolist(), strict=True)
        ][:num_worth_it]

    def begin_promotion(self, promotion: Promotion) -> None:
        """As `begin`; how many hits it brings will be counted."""
        layer, expert, slot, score = promotion
        key, evicted = layer * self.num_experts + expert, int(self._key_of[slot])
        evicted_uses = float(self._uses[evicted]) if evicted >= 0 else 0.0
        self._swaps.append(_Swap(self._step, key, evicted, score, float(self._uses[key]), evicted_uses))
        self.begin(layer, expert, slot)

    def begin(self, layer: int, expert: int, slot: int) -> None:
        """Gives `slot` (free, or resident and unpinned: that expert is evicted now) to an absent expert: loading."""
        key = layer * self.num_experts + expert
        assert self._slot_of[key] < 0, (layer, expert)
        if self._state[slot] == _RESIDENT:
            self.evict(slot)
        assert self._state[slot] == _FREE, (slot, self._state[slot])
        if self._free[-1] == slot:
            self._free.pop()
        else:
            self._free.remove(slot)
        self._slot_of[key], self._key_of[slot], self._state[slot] = slot, key, _LOADING
        self._held[layer] += 1

    def commit(self, slot: int) -> None:
        """The expert's bytes are in its slot."""
        assert self._state[slot] == _LOADING, (slot, self._state[slot])
        self._state[slot] = _RESIDENT

    def abort(self, slot: int) -> None:
        """The bytes will not come: the slot is free again."""
        assert self._state[slot] == _LOADING, (slot, self._state[slot])
        self._state[slot] = _RESIDENT
        self.evict(slot)

    def lend(self, count: int) -> list[tuple[int, tuple[int, int] | None]]:
        """Up to `count` slots for something else until `take_back`, each with the (layer, expert) that is evicted from
        it: free ones first, then those of the coldest."""
        free = self.free_slots[:count]
        lent = [(slot, None) for slot in free]
        for slot in self.choose_victims(count - len(free)) if count > len(free) else []:
            lent.append((slot, self.key(slot)))
            self.evict(slot)
        slots = {slot for slot, _ in lent}
        self._free = [slot for slot in self._free if slot not in slots]
        self._state[list(slots)] = _LENT
        return lent

    def take_back(self, slots: Sequence[int]) -> None:
        """They are free again."""
        assert (self._state[list(slots)] == _LENT).all(), slots
        self._state[list(slots)] = _FREE
        self._free += sorted(slots, reverse=True)

    def evict(self, slot: int) -> None:
        """Frees the slot of an unpinned resident."""
        assert self._state[slot] == _RESIDENT and self._pins[slot] == 0, (slot, self._state[slot], self._pins[slot])
        self._slot_of[self._key_of[slot]] = -1
        self._held[self._key_of[slot] // self.num_experts] -= 1
        self._key_of[slot], self._state[slot] = -1, _FREE
        self._free.append(slot)
