"""Pictures: each kind of result becomes an SVG that holds its numbers' names, with no colour of one theme only."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.plot import check_plotting, draw, read_any

pytest.importorskip("matplotlib", reason="pip install 'kimi-lite[tools]' brings matplotlib")


def bench_result(program: str, kind: str, depth: int) -> dict:
    tok_s = {"mean": 50.0 - depth / 100, "sd": 1.0, "samples": [50.0]}
    share = 0.5 if kind == "tg" else None
    return {
        **{"program": program, "kind": kind, "num_tokens": 64, "num_sequences": 1, "depth": depth},
        **{"tok_s": tok_s, "limit_share": share},
    }


def kernel_result(gb_s: float, ggml: float | None) -> dict:
    return {"gb_s": gb_s, "bandwidth_share": gb_s / 30, "gweights_s": 10.0, "ggml_gweights_s": ggml}


def event(name: str, start: float, category: str = "layer 0") -> dict:
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": 10.0}


BENCH = {
    "tool": "kimi-lite bench",
    "results": [bench_result(p, k, d) for p in ("kimi-lite", "llama.cpp") for k in ("pp", "tg") for d in (0, 512)],
}
KERNELS = {
    **{"tool": "kernel_bench", "threads": 2, "read_gb_s": 30.0},
    "types": {"Q8_0": kernel_result(25.0, 9.0), "Q2_0": kernel_result(9.0, None)},
}
QUALITY = [
    {
        **{"tool": "quality", "model": {"file": f"{name}.gguf", "file_bytes": size}},
        "references": [{"kl_nats": {"mean": kl, "error": kl / 9}}],
    }
    for name, size, kl in (("q4_k", 2e8, 0.02), ("q8_0", 4e8, 0.001))
]
OPERATIONS = (("token_embd", 0), ("old", 10), ("token_embd", 50), ("experts", 60), ("output", 80))
TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "thread_name"},
        *(event(name, start) for name, start in OPERATIONS),
        event("layer 0", 60, "layer"),
    ]
}


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([BENCH], ["kimi-lite tg64", "llama.cpp pp64", "memory's bound", "tokens of context"]),
        ([KERNELS], ["Q8_0", "83%", "plain read, 30.0 GB/s", "llama.cpp"]),
        (QUALITY, ["q4_k", "q8_0", "KL divergence, nats"]),
        ([TRACE], ["experts  25%", "output  25%", "ms of one token"]),
    ],
    ids=["speed", "kernels", "quality", "timeline"],
)
def test_every_kind(tmp_path, documents, words):
    draw(tmp_path / "out.svg", documents)
    text = (tmp_path / "out.svg").read_text()
    ElementTree.fromstring(text)
    said = " ".join(ElementTree.fromstring(text).itertext())
    assert all(word in said for word in words), said
    assert "old" not in said.split()  # only the last token
    colours = {c for c in re.findall(r"#[0-9a-f]{6}", text) if c not in ("#ffffff",)}
    brightness = [sum(int(c[i : i + 2], 16) * w for i, w in ((1, 0.3), (3, 0.59), (5, 0.11))) for c in colours]
    assert brightness and min(brightness) > 60 and max(brightness) < 200, colours
    draw(tmp_path / "out.png", documents)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))
    draw(tmp_path / "again.svg", documents)
    assert (tmp_path / "again.svg").read_text() == text


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(KimiLiteError, match="2 kinds"):
        draw(tmp_path / "a.svg", [BENCH, KERNELS])
    with pytest.raises(KimiLiteError, match=r"ends in '\.pdf'"):
        draw(tmp_path / "a.pdf", [BENCH])
    with pytest.raises(KimiLiteError, match="without a reference"):
        draw(tmp_path / "a.svg", [QUALITY[0] | {"references": []}])
    for text in ("", "{}", "[1]", "table\n{"):
        (tmp_path / "x").write_text(text)
        with pytest.raises(KimiLiteError):
            read_any(tmp_path / "x")
    (tmp_path / "x").write_text("| table |\n" + json.dumps(BENCH) + "\n")
    assert read_any(tmp_path / "x") == BENCH
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KimiLiteError) as caught:
        check_plotting(tmp_path / "a.svg")
    assert "kimi-lite[tools]" in caught.value.hint
