"""/ctx, /stats, /tokens, /experts: what the conversation holds, what it cost and what the model did for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kimi_lite.apps.chat.commands.registry import Registry
from kimi_lite.apps.chat.context import drop_oldest, summarise_oldest
from kimi_lite.apps.chat.pictures import bar, heat_rows
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.units import counted, gib

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

COMMANDS = Registry()
_SHOWN_TOKENS = 200
_CACHE_COUNTERS = ("kv_", "prefix_", "images_")
_COUNTERS = {
    "expert_hits": "found in RAM",
    "expert_late": "found in RAM, but late",
    "expert_misses": "read from disk",
    "expert_guesses": "read ahead by a guess",
    "expert_right_guesses": "guesses that were right",
    "expert_wait_s": "time waited for experts",
    "expert_slots": "experts that fit in RAM",
    "expert_resident_bytes": "experts in RAM",
    "expert_reads_from_ram": "copied from RAM",
    "expert_reads_from_file": "copied from the file",
    "expert_bytes_from_ram": "copied from RAM to the GPU",
    "expert_bytes_from_file": "copied from the file to the GPU",
    "disk_bytes": "read from disk",
    "disk_busy_s": "time the disk was busy",
    "disk_is_direct": "disk read past the page cache",
    "gpu_expert_slots": "experts that fit in VRAM",
    "gpu_experts": "experts in VRAM",
    "gpu_expert_hits": "found in VRAM",
    "gpu_expert_misses": "computed on the CPU",
    "expert_promotions": "copied to VRAM",
    "expert_promotions_cancelled": "copies to VRAM given up",
    "promotion_cost_s": "time that a copy to VRAM costs",
    "promotion_gain_s": "time that a copy to VRAM saves",
    "stream_expert_s": "time of an expert over the bus",
    "stream_expert_beside_s": "while the CPU computes others",
    "cpu_expert_s": "time of an expert on the CPU",
    "cpu_choice_s": "and of each token that chose it",
    "cpu_slowdown": "times slower while the bus is at work",
    "expert_threads": "threads of the CPU's experts",
    "streamed_experts": "streamed to the GPU for prompts",
    "stream_bus_bytes": "over the bus for prompts",
    "stream_s": "time of layers that stream",
    "stream_cpu_s": "of it, the CPU's share",
    "stream_busy_s": "time the stream was at work",
    "stream_read_wait_s": "of it, waiting for RAM or disk",
    "stream_bus_wait_s": "of it, waiting for the bus",
    "stream_slots": "experts that the stream may be ahead",
    "stream_slots_lent": "of them, lent by the cache",
    "dense_gpu_bytes": "other weights in VRAM",
}


@COMMANDS.command("ctx", usage="[drop [N] | summarise [N]]", arguments=("drop", "summarise"))
def _ctx(chat: Chat, argument: str) -> None:
    """how full the context is; no longer send the N oldest exchanges, or a summary in their place"""
    word, _, rest = argument.partition(" ")
    if word:
        if word[0].isdecimal():
            raise KimiLiteError(
                "The context's length is set at the start.", f"Use kimi-lite chat -c {word} --continue."
            )
        if word not in ("drop", "summarise", "summarize"):
            raise KimiLiteError(f"/ctx {argument} is not known.", "It is /ctx, /ctx drop [N] or /ctx summarise [N].")
        num_exchanges = _num_exchanges(chat, rest.strip())
        if word == "drop":
            drop_oldest(chat, num_exchanges)
        else:
            summarise_oldest(chat, num_exchanges)
    _show_context(chat)


def _num_exchanges(chat: Chat, text: str) -> int:
    """As typed, or half of them."""
    have = len(chat.conversation.exchanges)
    if have == 0:
        raise KimiLiteError("There is nothing in the context yet.")
    if text and not (text.isdecimal() and 0 < int(text) <= have):
        raise KimiLiteError(
            f"{text!r} is not a number of exchanges from 1 to {have}.", "/ctx shows how many there are."
        )
    return int(text) if text else max(have // 2, 1)


def _show_context(chat: Chat) -> None:
    conversation = chat.conversation
    used, total = _num_used(chat), conversation.context_length
    num_hidden = sum(turn.role == "user" for turn in conversation.turns[: conversation.num_dropped])
    parts = [counted(len(conversation.exchanges), "exchange")]
    if num_hidden:
        parts.append(f"{num_hidden} older {'summarised' if conversation.summary else 'dropped'}")
    if total is None:
        chat.say(" · ".join([f"{used:,} tokens of a context whose length the endpoint does not say", *parts]))
        return
    width = max(min(chat.status.width - 60, 32), 8)
    parts = [f"{used:,} of {total:,} tokens ({100 * used / total:.0f} %)", *parts]
    chat.say(f"{bar(used / total, width)} " + " · ".join(parts))


def _num_used(chat: Chat) -> int:
    """Counted here, or what the endpoint said with its last answer."""
    used = chat.conversation.count_tokens()
    last = next((turn.stats for turn in reversed(chat.conversation.turns) if turn.stats is not None), None)
    if used is None:
        used = 0 if last is None else last.prompt_tokens + last.generated_tokens
    return used


@COMMANDS.command("stats")
def _stats(chat: Chat, argument: str) -> None:
    """what the conversation took: tokens, how many came from the cache, speeds, memory"""
    all_stats = [turn.stats for turn in chat.conversation.turns if turn.stats is not None]
    if not all_stats:
        raise KimiLiteError("There is no answer yet.", "Ask something.")
    prompt, cached, generated = (
        sum(getattr(stats, name) for stats in all_stats)
        for name in ("prompt_tokens", "cached_tokens", "generated_tokens")
    )
    rows = [
        ("answers", f"{len(all_stats)}"),
        (
            "prompt",
            f"{prompt:,} tokens, {cached:,} of them cached{_speed(prompt - cached, [s.prompt_s for s in all_stats])}",
        ),
        ("generated", f"{generated:,} tokens{_speed(generated - len(all_stats), [s.generation_s for s in all_stats])}"),
        ("first token", _times([s.time_to_first_token_s for s in all_stats])),
        ("settings", chat.conversation.mode),
        ("conversation", chat.autosave.name),
    ]
    chat.say_table([*rows, *_cache_rows(chat.conversation.counters()), ("memory", _memory())])


def _cache_rows(counters: Mapping[str, float]) -> list[tuple[str, str]]:
    """What is kept of prompts and answers, here and on disk."""
    rows = []
    if "kv_pages" in counters:
        held, total = (counters[name] * PAGE_TOKENS for name in ("kv_pages_held", "kv_pages"))
        kept = counters["kv_pages_idle"] * PAGE_TOKENS
        rows.append(("cache", f"{held + kept:,.0f} of {total:,.0f} tokens kept"))
    if "prefix_pages_found" in counters:
        found, saved = (counters[f"prefix_pages_{what}"] * PAGE_TOKENS for what in ("found", "saved"))
        rows.append(("prompts on disk", f"{found:,.0f} tokens found, {saved:,.0f} saved"))
    if "images_seen" in counters:
        seen, found = counters["images_seen"], counters["images_found"]
        rows.append(("images", f"{seen:,.0f} seen, {found:,.0f} times known already"))
    return rows


def _speed(num_tokens: int, times_s: list[float]) -> str:
    return f", {num_tokens / sum(times_s):,.1f} a second" if sum(times_s) > 0 and num_tokens > 0 else ""


def _times(times_s: list[float]) -> str:
    ordered = sorted(times_s)
    return f"median {ordered[len(ordered) // 2]:.2f} s, longest {ordered[-1]:.2f} s"


def _memory() -> str:
    import psutil

    return f"{psutil.Process().memory_info().rss / 1024**3:.2f} GiB in this process, mapped files included"


@COMMANDS.command("tokens", usage="[all]", arguments=("all",))
def _tokens(chat: Chat, argument: str) -> None:
    """ids and pieces of the last answer, as sampled"""
    turn = next((turn for turn in reversed(chat.conversation.turns) if turn.role == "assistant"), None)
    if turn is None:
        raise KimiLiteError("There is no answer yet.", "Ask something.")
    ids = turn.ids if argument == "all" else turn.ids[-_SHOWN_TOKENS:]
    pieces = chat.conversation.pieces(ids)
    if not ids or pieces is None:
        raise KimiLiteError("The ids of the last answer are not known here.", "An endpoint or another model made it.")
    if len(ids) < len(turn.ids):
        chat.say(f"the last {len(ids)} of {len(turn.ids):,} tokens (/tokens all)")
    chat.say_flow([f"{i} {piece!r}" for i, piece in zip(ids, pieces, strict=True)])


@COMMANDS.command("experts")
def _experts(chat: Chat, argument: str) -> None:
    """where experts were found (GPU, RAM, disk) and how often each was used lately, as a picture"""
    counters, heat = chat.conversation.counters(), chat.conversation.heat()
    of_experts = {name: value for name, value in counters.items() if not name.startswith(_CACHE_COUNTERS)}
    rows = [_counter(name, value) for name, value in of_experts.items() if name != "promotion_budget"]
    chat.say_table(rows + _hit_rates(of_experts) + _decisions(of_experts))
    if heat is None and not counters:
        chat.say("the endpoint does not say where its experts lie")
    elif heat is None:
        chat.say("expert use is counted only with a GPU or with --ram below the model's size")
    else:
        for line in heat_rows(heat, max(chat.status.width - 8, 16), is_ascii="utf" not in chat.status.encoding.lower()):
            chat.say(line)


def _counter(name: str, value: float) -> tuple[str, str]:
    """In words, by the unit at the end of its name."""
    words = _COUNTERS.get(name, name.removesuffix("_bytes").removesuffix("_s").replace("_", " "))
    if name.startswith("disk_is"):
        return words, "yes" if value else "no"
    if name.endswith("_bytes"):
        return words, gib(value)
    if name.endswith("_s"):
        return words, f"{value:,.2f} s" if value >= 0.1 or value == 0 else f"{1e3 * value:,.2f} ms"
    return words, f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def _decisions(counters: Mapping[str, float]) -> list[tuple[str, str]]:
    """What the program chose by the times it measured."""
    from kimi_lite.experts.costs import promotion_words

    if "promotion_budget" not in counters:
        return []
    known = (counters[f"promotion_{what}"] for what in ("cost_s", "gain_s"))
    return [("copied to VRAM while it answers", promotion_words(int(counters["promotion_budget"]), *known))]


def _hit_rates(counters: Mapping[str, float]) -> list[tuple[str, str]]:
    """`x_hits`, `x_late` and `x_misses` say how often x had it in time."""
    rates = []
    for name, hits in counters.items():
        if not name.endswith("hits") or name.replace("hits", "misses") not in counters:
            continue
        misses = counters[name.replace("hits", "misses")] + counters.get(name.replace("hits", "late"), 0)
        if hits + misses > 0:
            what = name.removesuffix("hits").strip("_").replace("_", " ")
            rates.append((f"{what} hit rate".strip(), f"{100 * hits / (hits + misses):.1f} %"))
    return rates
