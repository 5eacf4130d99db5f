"""Generated events, any of them with any text."""

from typing import Any, Literal, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from kimi_lite.apps.swarm.events import KINDS, Event, Totals, Usage

HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07",
    "\u202eabc\u2066",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "]]><!--&amp;'\"",
    "\ud800 lone",
    "[bold]markup[/bold] [/]",
    "a\r\nb\x00c\x85d\u2028e",
    "x" * 3000,
    "日本語 👩‍👩‍👧‍👦 \u0301\u0301",
)
texts = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(), max_size=40))
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
_seconds = st.floats(0, 1e6, allow_nan=False)


def values(wanted: Any) -> st.SearchStrategy:
    """Of a field that is annotated so."""
    if get_origin(wanted) is Literal:
        return st.sampled_from(get_args(wanted))
    if get_origin(wanted) is tuple:
        return st.lists(texts, max_size=4).map(tuple)
    known = {
        str: texts,
        int: st.integers(0, 10**9),
        float: _seconds,
        float | None: st.none() | _seconds,
        Usage: st.builds(Usage, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6)),
        Totals: st.builds(Totals, seconds=_seconds, sequential_s=_seconds, steps=st.integers(0, 10**6)),
    }
    return known[wanted] if wanted in known else st.dictionaries(texts, _json, max_size=3)


def of_kind(kind: type[Event]) -> st.SearchStrategy[Event]:
    return st.builds(
        kind, **{name: values(hint) for name, hint in get_type_hints(kind).items() if name != "is_durable"}
    )


events = st.one_of([of_kind(kind) for kind in KINDS.values()])
