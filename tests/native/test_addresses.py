"""No compiled function takes the address of an array, and nothing takes one of an array that no name holds.

Numba counts references by name: an array whose last use is `array.ctypes.data` is freed there, and whatever is done
with the address afterwards reads and writes memory that belongs to others. So arrays are made outside and addresses
passed in. In Python the same holds for a temporary: `f(x).ctypes.data` outlives what it points to.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kimi_lite", "native", "quantize", "tools")
COMPILERS = {
    "njit",
    "jit",
    "vectorize",
    "guvectorize",
    "cfunc",
    "kernel",
    "Kernel",
    "function",
    "Function",
    "implements",
    "overload",
}
COMPILERS |= {"for_literals", "stencil", "generated_jit"}
ADDRESSES = {"ctypes", "data_as", "from_buffer", "addressof", "__array_interface__"}


def name_of(node: ast.expr) -> str:
    """The name that a decorator or a called function ends in: `numba.njit(...)(f)` is njit."""
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def compiled_names(tree: ast.Module) -> set[str]:
    """Functions that Numba compiles: decorated, handed to a compiler, or imported from the kernels' own modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and COMPILERS & {name_of(each) for each in node.decorator_list}:
            names.add(node.name)
        if isinstance(node, ast.Call) and name_of(node.func) in COMPILERS:
            names |= {each.id for each in node.args if isinstance(each, ast.Name)}
        if isinstance(node, ast.ImportFrom) and "native.simd" in (node.module or ""):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def is_entry(function: ast.FunctionDef) -> bool:
    """Compiled for one signature, `@function("void(int64)")`: Python calls it."""
    return any(isinstance(each, ast.Call) and each.args for each in function.decorator_list)


def compiled_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Those, and every function that calls one of them which Python does not call: nested functions made for a compiler
    are found by what they call."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    entries = {function.name for function in functions if is_entry(function)}
    names, before = compiled_names(tree), set()
    while names != before:
        before = set(names)
        for function in functions:
            if called_names(function) & (names - entries):
                names.add(function.name)
    return [function for function in functions if function.name in names]


def own_nodes(function: ast.FunctionDef) -> list[ast.AST]:
    """The function's nodes without those of functions inside it."""
    found, left = [], list(function.body)
    while left:
        node = left.pop()
        found.append(node)
        if not isinstance(node, ast.FunctionDef):
            left += ast.iter_child_nodes(node)
    return found


def called_names(function: ast.FunctionDef) -> set[str]:
    calls = (node for node in own_nodes(function) if isinstance(node, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def faults(source: str) -> list[str]:
    """What takes an address that it must not: "function:line"."""
    tree, found = ast.parse(source), []
    for function in compiled_functions(tree):
        taken = [node for node in own_nodes(function) if isinstance(node, ast.Attribute) and node.attr in ADDRESSES]
        found += [f"{function.name}:{node.lineno}" for node in taken]
    for node in ast.walk(tree):
        is_address = isinstance(node, ast.Attribute) and node.attr == "ctypes"
        if is_address and isinstance(node.value, (ast.Call, ast.BinOp, ast.UnaryOp, ast.IfExp, ast.ListComp)):
            found.append(f"temporary:{node.lineno}")
    return found


def sources() -> list[Path]:
    """Every source file once: `kimi_lite` shows the other folders through links."""
    files = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert len(files) > 100, len(files)
    return sorted(files)


def test_no_source_takes_an_address_that_dies():
    found = {str(path.relative_to(ROOT)): faults(path.read_text()) for path in sources()}
    assert not {path: places for path, places in found.items() if places}


@pytest.mark.parametrize(
    "source",
    [
        "@njit\ndef f(n):\n    scratch = np.empty(n)\n    at = scratch.ctypes.data\n    return at",
        "def f(n):\n    return np.empty(n).ctypes.data",
        "def make():\n    def g(n):\n        store_f32(np.empty(n).ctypes.data, n)\n    return kernel(g)",
        "def _feed(n):\n    a = np.empty(n)\n    b = a.ctypes.data\ncompiled = njit(sig, cache=True)(_feed)",
        "from kimi_lite.native.simd import load_f32\n"
        "def maker():\n    def inner(a):\n        return load_f32(a.ctypes.data)",
        "from kimi_lite.native.simd import load_f32\n@njit\ndef f(a):\n    return g(a)\n"
        "def g(a):\n    x = a.ctypes\n    return load_f32(x.data)",
        "address = (a + b).ctypes.data",
    ],
)
def test_the_kind_is_found(source):
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        "def op(a):\n    return arguments(a.ctypes.data)",
        "compiled = kernel_of(name).compiled.ctypes(a.ctypes.data)",
        "@njit\ndef f(address):\n    return load_f32(address)",
    ],
)
def test_what_is_allowed(source):
    assert not faults(source)
