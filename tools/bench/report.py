"""How `tools.bench` prints: the machine and its limit, a line for each test as it is measured, the comparison, CSV.

Tables are Markdown and fit 80 columns, so that they can be pasted into an issue.
"""

import csv
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from kimi_lite.plan.types import Plan
from kimi_lite.plan.view import WIDTH, place_lines
from kimi_lite.terminal import write
from kimi_lite.tools.bench.result import Result, Spread
from kimi_lite.tools.bench.roofline import Bandwidth, Limit
from kimi_lite.units import number

if TYPE_CHECKING:
    from kimi_lite.tools.bench.endpoint import EndpointMeasured, EndpointResult

_RESULTS = (("test", -14), ("t/s warm", 14), ("first", 6), ("TTFT s", 6), ("p50/p99", 9), ("GB/s", 4), ("limit", 5))
_LIMITS = (
    ("a token of", -17),
    ("place", 5),
    ("weights", 7),
    ("experts", 7),
    ("cache", 7),
    ("expected", 8),
    ("limit", 7),
)
_TIERS = (("test", -17), ("experts there", 13), ("MB from disk", 12))
_RATIOS = (("test", -17), ("kimi-lite", 14), ("other", 14), ("ratio", 13), ("drop", 6))
_SWEEP = (("PP", 5), ("TG", 5), ("N_KV", 6), ("T_PP s", 8), ("S_PP t/s", 9), ("T_TG s", 8), ("S_TG t/s", 9))
_ENDPOINT = (("test", -12), ("all t/s", 12), ("each", 5), ("TTFT", 11), ("gap", 9), ("hit", 4), ("bad", 3))
_CHART_WIDTH = 52
_LEAST_DISK_BYTES = 50_000  # a token: less is the system's own reading
_CSV_FIELDS = (
    *("program", "test", "kind", "num_tokens", "depth", "num_sequences", "tok_s", "tok_s_sd", "first_tok_s", "ttft_s"),
    *("gap_p50_s", "gap_p99_s", "gb_s", "limit_share", "disk_bytes_per_token", "expert_hit_share", "num_dropped"),
    *("is_noisy", "lost_share"),
)
ENDPOINT_CSV_FIELDS = (
    *("test", "kind", "num_tokens", "depth", "num_sequences", "tok_s", "tok_s_sd", "each_tok_s", "ttft_p50_s"),
    *("ttft_p99_s", "gap_p50_s", "gap_p99_s", "prompt_tokens", "cached_share", "generated_tokens", "num_requests"),
    *("num_errors", "num_dropped", "is_noisy"),
)


class Report:
    """Prints to `out` (the table's destination) as results come."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def say(self, line: str = "") -> None:
        write(self.out, line + "\n")

    def print_machine(self, environment: Mapping, model: Mapping) -> None:
        isa = environment["isa"]
        self.say(f"model  {model['name']}")
        self.say(
            f"file   {model['file']}, {model['file_bytes'] / 1e9:.3f} GB, "
            f"{model['total_parameters'] / 1e6:,.0f} M weights"
        )
        self.say(f"cpu    {environment['cpu']}, {environment['threads']} threads, {isa['name']} ({isa['instruction']})")

    def print_plan(self, plan: Plan) -> None:
        """What lies where."""
        for row, line in enumerate(place_lines(plan, WIDTH - 7)):
            self.say(f"{'plan   ' if row == 0 else '':<7}{line}")
        for warning in plan.warnings:
            self.say(warning)

    def print_roofline(self, bandwidth: Bandwidth, limits: Sequence[Limit]) -> None:
        """What can be expected comes before the measurement."""
        noise = " (noisy)" if bandwidth.is_noisy else ""
        self.say(
            f"read   RAM {bandwidth.gb_s:.1f} GB/s{noise}, {bandwidth.stolen_share:.1%} of CPU time stolen meanwhile"
        )
        if not limits:
            return
        self._head(_LIMITS)
        for limit in limits:
            parts = (limit.resident_bytes, limit.expert_bytes, limit.cache_bytes)
            speeds = [number(limit.expected_tok_s), number(limit.limit_tok_s)]
            for place in limit.bytes_by_place:
                self._row(_LIMITS, [limit.test.name, place, *(number(part / 1e6) for part in parts), *speeds])
        self.say("weights, experts, cache: MB of a token; expected, limit: tokens/s")

    def begin_results(self) -> None:
        self._head(_RESULTS)

    def print_result(self, result: Result) -> None:
        gaps = f"{number(1000 * result.gap_p50_s)}/{number(1000 * result.gap_p99_s)}" if result.gap_p50_s else "-"
        cells = [result.test.name, spread(result.tok_s), number(result.first_tok_s), number(result.ttft_s)]
        share = "-" if result.limit_share is None else f"{result.limit_share:.0%}"
        self._row(_RESULTS, [*cells, gaps, number(result.gb_s), share])

    def end_results(self, results: Sequence[Result]) -> None:
        self.say("p50/p99: ms between tokens; limit: share of what reading memory allows")
        dropped, noisy = sum(r.num_dropped for r in results), sum(r.is_noisy for r in results)
        if dropped:
            self.say(f"{dropped} disturbed repeats were dropped")
        if noisy:
            self.say(f"{noisy} of {len(results)} tests are noisy: other processes or the hypervisor kept the cores")
        if any(r.expert_hit_share is not None for r in results):
            self.print_tiers(results)
        elif any(r.disk_bytes_per_token >= _LEAST_DISK_BYTES for r in results):
            worst = max(results, key=lambda r: r.disk_bytes_per_token)
            self.say(f"{worst.disk_bytes_per_token / 1e6:.1f} MB a token came from disk in {worst.test.name}")

    def print_tiers(self, results: Sequence[Result]) -> None:
        """Of the routed experts that tokens asked for; bytes are those of a token."""
        self._head(_TIERS)
        for result in (result for result in results if result.expert_hit_share is not None):
            there, megabytes = f"{result.expert_hit_share:.1%}", number(result.disk_bytes_per_token / 1e6)
            self._row(_TIERS, [result.test.name, there, megabytes])

    def print_comparison(self, rows: Sequence[tuple[Result, Result, Spread]]) -> None:
        """With one other program."""
        other = rows[0][1].program
        self._head([(other if name == "other" else name, width) for name, width in _RATIOS])
        for ours, theirs, ratio in rows:
            cells = [ours.test.name, spread(ours.tok_s), spread(theirs.tok_s), spread(ratio)]
            self._row(_RATIOS, [*cells, f"{ours.num_dropped}{'*' if ours.is_noisy else ''}"])
        self.say(f"ratio: our speed / {other}'s; drop: disturbed turns; *: disturbed ones kept")

    def print_sweep(self, results: Sequence[Result]) -> None:
        """llama.cpp's sweep-bench: prompt and generation down the context, times of one piece and speeds."""
        self._head(_SWEEP)
        places = dict.fromkeys((r.test.num_sequences, r.test.depth) for r in results)
        for place in places:
            at = {r.test.kind: r for r in results if (r.test.num_sequences, r.test.depth) == place}
            counts = [str(at[kind].test.total_tokens) if kind in at else "-" for kind in ("pp", "tg")]
            cells = [*counts, str(place[1])]
            for kind in ("pp", "tg"):
                rate = at[kind].tok_s.mean if kind in at else None
                cells += [number(rate and at[kind].test.total_tokens / rate), number(rate)]
            self._row(_SWEEP, cells)
        for kind, title in (("pp", "reading a prompt"), ("tg", "generating")):
            self._print_chart(title, [r for r in results if r.test.kind == kind])

    def _print_chart(self, title: str, results: Sequence[Result]) -> None:
        """A bar for each depth, as long as its speed."""
        if len(results) < 2:
            return
        self.say(f"\n{title}, tokens/s at each depth")
        fastest = max(r.tok_s.mean for r in results)
        for r in results:
            batch = f" x{r.test.num_sequences}" if r.test.num_sequences > 1 else ""
            drawn = bar(r.tok_s.mean / fastest, _CHART_WIDTH)
            self.say(f"{f'{r.test.depth:,}{batch}':>12} {drawn:<{_CHART_WIDTH}} {number(r.tok_s.mean)}")

    def print_endpoint(self, measured: "EndpointMeasured") -> None:
        """Who is asked, and who counts."""
        context = f", context {measured.context_length:,}" if measured.context_length else ""
        self.say(f"server {measured.url}")
        self.say(f"model  {measured.model}{context}")
        if not measured.is_counted:
            self.say("tokens the server does not count them: a piece of the answer is taken for one, and prompts")
            self.say("       are estimated from their characters")

    def begin_endpoint_results(self) -> None:
        self._head(_ENDPOINT)

    def print_endpoint_result(self, result: "EndpointResult") -> None:
        all_tok_s = "-" if result.tok_s is None else spread(result.tok_s)
        cached = "-" if result.cached_share is None else f"{result.cached_share:.0%}"
        cells = [result.test.name, all_tok_s, number(result.each_tok_s), _pair_ms(result.ttft_p50_s, result.ttft_p99_s)]
        cells += [_pair_ms(result.gap_p50_s, result.gap_p99_s), cached, str(result.num_errors or "-")]
        self._row(_ENDPOINT, cells)

    def end_endpoint_results(self, measured: "EndpointMeasured") -> None:
        """What must be known to read the table."""
        self.say("all, each: of all requests together, of one among them; TTFT: ms to the first piece, gap: ms between")
        self.say("pieces, p50/p99; hit: share of the prompt in the server's cache; bad: requests that failed")
        short = [
            r for r in measured.results if r.test.kind == "tg" and (r.generated_tokens or 0) < r.test.num_tokens - 1
        ]
        if short:
            least = min(r.generated_tokens or 0 for r in short)
            self.say(
                f"answers ended before their length in {len(short)} tests: {least:.0f} tokens in the mean at least"
            )
        if measured.left_out:
            self.say(f"the server does not know {', '.join(measured.left_out)}: asked without")
        dropped, noisy = sum(r.num_dropped for r in measured.results), sum(r.is_noisy for r in measured.results)
        if dropped:
            self.say(f"{dropped} disturbed repeats were dropped")
        if noisy:
            self.say(f"{noisy} of {len(measured.results)} tests are noisy: this machine was busy")
        for error, count in measured.errors.most_common():
            self.say(f"failed {count} x {error}")

    def _head(self, columns: Sequence[tuple[str, int]]) -> None:
        self.say()
        self._row(columns, [name for name, _ in columns])
        self.say("|" + "|".join("-" * (abs(width) + 1) + ("-" if width < 0 else ":") for _, width in columns) + "|")

    def _row(self, columns: Sequence[tuple[str, int]], cells: Sequence[str]) -> None:
        pairs = zip(cells, (width for _, width in columns), strict=True)
        aligned = (f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}" for cell, width in pairs)
        self.say("| " + " | ".join(aligned) + " |")


def write_csv(results: "Sequence[Result | EndpointResult]", out: TextIO, fields: Sequence[str] = _CSV_FIELDS) -> None:
    """A line for each test and program."""
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in results:
        rate = {} if result.tok_s is None else {"tok_s": result.tok_s.mean, "tok_s_sd": result.tok_s.sd}
        writer.writerow(result.to_json() | rate)


def _pair_ms(p50_s: float | None, p99_s: float | None) -> str:
    return "-" if p50_s is None or p99_s is None else f"{number(1000 * p50_s)}/{number(1000 * p99_s)}"


def bar(share: float, width: int) -> str:
    """A bar of `share` of `width` columns, to an eighth of a column."""
    eighths = round(8 * width * max(0.0, min(1.0, share)))
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def spread(value: Spread) -> str:
    return f"{number(value.mean)} ± {number(value.sd)}"
