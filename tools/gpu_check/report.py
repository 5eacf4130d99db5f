"""Lines as they come, the table at the end, and everything as one line of JSON."""

import json
from collections.abc import Iterator, Sequence

_MOST_WRONG = 8  # results that are told in the table

# What the table says, in this order: label, stage, name of the result
NUMBERS = (
    ("GPU", "machine", "gpu"),
    ("torch, Triton, CUDA, driver", "machine", "versions"),
    ("C compiler, Python.h", "machine", "compiler"),
    ("VRAM free", "machine", "vram_free"),
    ("VRAM read", "machine", "vram_read"),
    ("host to GPU, pinned", "machine", "host_to_gpu"),
    ("GPU to host, pinned", "machine", "gpu_to_host"),
    ("9.3 MB copy", "machine", "copy_9.3MB"),
    ("RAM read, all cores", "machine", "ram_read"),
    ("kernel launch", "machine", "launch"),
    ("graph launch", "machine", "graph_launch"),
    ("event seen by the host", "machine", "event_to_host"),
    ("flag seen by the host", "machine", "flag_to_host"),
    ("kernels compared", "kernels", "compared"),
    ("worst kernel, of its limit", "kernels", "worst"),
    ("a layer: attention", "parts", "attention"),
    ("a layer: router", "parts", "router"),
    ("a layer: shared expert", "parts", "shared expert"),
    ("a layer: 8 hits", "parts", "hits"),
    ("a layer: join", "parts", "join"),
    ("layer 0", "parts", "dense layer"),
    ("head", "parts", "head"),
    ("a token, no slots", "decode", "token_0"),
    ("a token, all slots", "decode", "token_all"),
    ("K2.5 from that, no hits", "decode", "whole_0"),
    ("the plan's bound for K2.5", "decode", "plan"),
    ("prompt of 512", "prompts", "prompt_512"),
    ("prompt of 8192", "prompts", "prompt_8192"),
)


def line_of(line: dict) -> str:
    """A result in words."""
    if line["name"] == "stage":
        return f"== {line['stage']}: {line['value']} ({line['s']} s){'  ' + line['log'] if line['log'] else ''}"
    mark = " " if line["ok"] else "!"
    return f" {mark} {line['stage']} {line['name']}: {_value(line)}"


def table(lines: Sequence[dict]) -> Iterator[str]:
    """About forty lines of Markdown: stages, the numbers that matter, what is wrong."""
    yield "| stage | end | s |"
    yield "|---|---|--:|"
    for line in lines:
        if line["name"] == "stage":
            yield f"| {line['stage']} | {line['value']} | {line['s']} |"
    yield ""
    yield "| | |"
    yield "|---|--:|"
    found = {(line["stage"], line["name"]): line for line in lines}
    for label, stage, name in NUMBERS:
        if (stage, name) in found:
            yield f"| {label} | {_value(found[stage, name])} |"
    wrong = [line for line in lines if not line["ok"] and line["name"] != "stage"]
    for line in wrong[:_MOST_WRONG]:
        yield f"wrong: {line['stage']} {line['name']}: {_value(line)}"
    if len(wrong) > _MOST_WRONG:
        yield f"and {len(wrong) - _MOST_WRONG} more: see results.jsonl"


def as_json(lines: Sequence[dict]) -> str:
    return json.dumps({"tool": "gpu_check", "ok": all(line["ok"] for line in lines), "results": list(lines)})


def _value(line: dict) -> str:
    value = line["value"]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    rest = {key: each for key, each in line.items() if key not in ("stage", "name", "value", "unit", "ok")}
    words = ", ".join(f"{key} {each:.4g}" if isinstance(each, float) else f"{key} {each}" for key, each in rest.items())
    return f"{shown} {line['unit']}".rstrip() + (f" ({words})" if words else "")
