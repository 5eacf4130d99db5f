"""The synchronizations of the product, found in its sources, and the product without one of them.

for site in find_sites(): ...
with without(site): ...  # the code runs as if that call were not there
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

import kimi_lite

_ROOT = Path(kimi_lite.__file__).parent
_FILES = sorted([*(_ROOT / "experts").glob("*.py"), *(_ROOT / "model/hybrid").glob("*.py")])
_OWN = "gpu_streams.py"  # where the calls are implemented
_CALLS = {"wait", "finish", "synchronize"}  # of a `GpuStreams`
_QUESTIONS = {"query"}  # of an event


@dataclass(frozen=True, slots=True)
class Site:
    """A call in a file. `function`: the qualified name of the function (of a class or a module) that it is in."""

    file: Path
    function: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.file.stem}.{self.function}: {self.text}"


def find_sites() -> list[Site]:
    """Every place where the host or a stream waits for the GPU."""
    return [site for file in _FILES if file.name != _OWN for site in _sites(file, ast.parse(file.read_text()), ())]


def _sites(file: Path, node: ast.AST, names: tuple[str, ...]) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) or (
            isinstance(child, ast.FunctionDef) and not isinstance(node, ast.FunctionDef)
        ):
            yield from _sites(file, child, (*names, child.name))
            continue
        if _is_site(child):
            yield Site(file, ".".join(names), child.lineno, child.col_offset, ast.unparse(child))
        yield from _sites(file, child, names)


def _is_site(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    called, owner = node.func.attr, ast.unparse(node.func.value)
    return called in _QUESTIONS or (called in _CALLS and owner.split(".")[-1].lstrip("_") == "streams")


@contextmanager
def without(site: Site) -> Iterator[None]:
    """Inside, the call is not made: what it is given is still worked out, and a question is answered with yes."""

    class Leaver(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            if (node.lineno, node.col_offset) != (site.line, site.column) or not _is_site(node):
                return node
            answer = ast.Constant(node.func.attr in _QUESTIONS or None)
            told = [node.func.value, *node.args, *(keyword.value for keyword in node.keywords), answer]
            last = ast.Constant(len(told) - 1)
            return ast.Subscript(ast.Tuple(told, ast.Load()), last, ast.Load())

    tree = ast.fix_missing_locations(Leaver().visit(ast.parse(site.file.read_text())))
    code = compile(tree, str(site.file), "exec")
    for name in site.function.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    function = _function(site)
    before, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = before


def _function(site: Site) -> FunctionType:
    found = importlib.import_module(".".join(site.file.relative_to(_ROOT.parent).with_suffix("").parts))
    for name in site.function.split("."):
        found = inspect.getattr_static(found, name)
    found = found.fget if isinstance(found, property) else found
    return inspect.unwrap(found.__func__ if isinstance(found, staticmethod | classmethod) else found)
