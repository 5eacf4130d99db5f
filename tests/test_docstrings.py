"""Names in docstrings and comments lead somewhere: a module, a class's member or a file that is written in backticks,
and every path and `python -m` in them, exists. Read from the sources alone; nothing is imported."""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kimi_lite", "native", "quantize", "tools", "tests")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents if parent != ROOT)
)
_FILE_NAME = re.compile(r"[\w./-]*\.(json|jsonl|model|safetensors|md|gguf|txt|toml|lock|png|metadata|svg|name)")


def module_name(path: Path) -> str:
    """As it is imported: kimi_lite.native.cpu.run for native/cpu/run.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] in ("kimi_lite", "tests") else ("kimi_lite", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def bound_names(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """What statements bind: functions, classes, imports, assignments, also below `if` and `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (((each.asname or each.name).split(".")[0], node) for each in node.names)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from bound_names([*node.body, *getattr(node, "orelse", [])])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from ((leaf.id, node) for leaf in ast.walk(target) if isinstance(leaf, ast.Name))


def members(node: ast.ClassDef) -> set[str]:
    """A class's own names, and what its methods set on `self`."""
    attributes = {leaf.attr for leaf in ast.walk(node) if isinstance(leaf, ast.Attribute)}
    return {name for name, _ in bound_names(node.body)} | attributes


class Names:
    """Every module of ours with what it binds, and every class with its members."""

    def __init__(self) -> None:
        self.modules: dict[str, set[str]] = {}
        self.classes: dict[str, set[str]] = defaultdict(set)
        self.class_of: dict[str, set[str]] = defaultdict(set)  # module -> members of its classes
        self.literals: set[str] = set()
        self.packages: set[str] = set()  # that our code imports
        bases: dict[str, list[str]] = defaultdict(list)
        for path in SOURCES:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            name = module_name(path)
            self.modules[name] = {bound for bound, _ in bound_names(tree.body)}
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.classes[node.name] |= members(node)
                    self.class_of[name] |= members(node)
                    bases[node.name] += [base.id for base in node.bases if isinstance(base, ast.Name)]
                elif isinstance(node, ast.Import):
                    self.packages |= {each.name.split(".")[0] for each in node.names}
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                    self.literals.add(node.value)
        for name, parents in bases.items():
            for parent in parents:
                self.classes[name] |= self.classes.get(parent, set())
        self.first_words = {part for name in self.modules for part in name.split(".")} | {"memory"}  # was a folder once

    def resolves(self, dotted: str, module: str) -> bool:
        """Whether the name, seen from the module, is one of ours. Names that do not look like ours pass: another
        package's, a GGUF key, a tensor's (layer N)."""
        parts = dotted.removesuffix("()").split(".")
        if parts[0] in self.classes:
            return parts[1] in self.classes[parts[0]]
        has_our_class = parts[0] not in self.packages and any(part in self.classes for part in parts)
        if not (parts[0] in self.first_words or has_our_class) or dotted in self.literals or "N" in parts:
            return True
        above = module.split(".")
        starts = {".".join(above[:depth]) for depth in range(len(above) + 1)} | {"kimi_lite", ""}
        return any(self._leads(f"{start}.{dotted}".strip(".").split(".")) for start in starts)

    def _leads(self, parts: list[str]) -> bool:
        """The longest module at the beginning, then one name in it, then a member of a class."""
        for depth in range(len(parts), 0, -1):
            found = ".".join(parts[:depth])
            if found in self.modules:
                rest = parts[depth:]
                if not rest:
                    return True
                is_bound = rest[0] in self.modules[found] or rest[0] in self.class_of[found]
                return is_bound and (len(rest) == 1 or rest[1] in self.classes.get(rest[0], {rest[1]}))
        return False


@cache
def names() -> Names:
    return Names()


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings and comments with the line that they begin in."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def wrong_names(path: Path) -> Iterator[str]:
    """Every name in the file's prose that leads nowhere."""
    for line, text in prose(path):
        for word in re.findall(r"`([^`\s]+)`", text):
            if (
                re.fullmatch(r"\w+(\.\w+)+(\(\))?", word)
                and not word.endswith(".py")
                and not _FILE_NAME.fullmatch(word)
            ):
                if not names().resolves(word, module_name(path)):
                    yield f"{path.relative_to(ROOT)}:{line}: `{word}`"
            elif word.endswith(".py") and "/" not in word and not any(each.name == word for each in SOURCES):
                yield f"{path.relative_to(ROOT)}:{line}: `{word}`"
        for place in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./]*\w", text):
            if not (ROOT / place).exists():
                yield f"{path.relative_to(ROOT)}:{line}: {place}"
        for module in re.findall(r"python -m ((?:kimi_lite|tools|quantize)[a-z_.]*[a-z_])\b", text):
            if f"kimi_lite.{module.removeprefix('kimi_lite.')}" not in names().modules and module != "kimi_lite":
                yield f"{path.relative_to(ROOT)}:{line}: python -m {module}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_in_docstrings_and_comments_exist(folder):
    wrong = [each for path in SOURCES if path.is_relative_to(ROOT / folder) for each in wrong_names(path)]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_name_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "kimi_lite" / "engine" / "one.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        '"""See `engine.nothing`, `kv.pages.KVCache.fly`, tools/none.py and python -m tools.gone."""\n'
        "# `kv.pages.KVCache`, `os.preadv`, `tools.bench` and `mcp.json` are fine.\n"
        "# `old_pages.KVCache.open`\n"
        "# `none_such.py`\n"
    )
    wrong = [each.split(": ")[1] for each in wrong_names(path)]
    assert wrong == [
        "`engine.nothing`", "`kv.pages.KVCache.fly`", "tools/none.py", "python -m tools.gone",
        "`old_pages.KVCache.open`", "`none_such.py`",
    ]  # fmt: skip
