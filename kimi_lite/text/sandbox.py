"""A chat template rendered so that only its own words can become control tokens.

Templates come with model files, messages from anywhere; both may be hostile. Before compiling, every control token that
the template's own text or string constants spell is replaced by a mark with a secret number; after rendering, only
these marks are control tokens. Message text goes through untouched, so every filter, test, slice and split of the
template sees the real text, and nothing in it, nor two messages in a row, nor a message next to the template's text,
can spell a mark. Constants that are only looked for (`'</think>' in content`, `content.split('</think>')`) stay as they
are: they must match message text. A template that assembles a control token from pieces (`'<|' ~ role ~ '|>'`) gets
plain text. The sandbox has no files, no imports and no attributes with underscores; loops and output are bounded. What
else a template may do with time and memory `serve` bounds: it runs in a process of its own, started by
`text.isolation`, that the system ends at its limits.
"""

import json
import re
import secrets
import signal
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO, ClassVar, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_SOURCE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 24  # a 256 K token prompt is about 1 M characters
MAX_MEMORY_BYTES = 256 << 20  # address space of the process that renders
MAX_CPU_S = 1.5  # of one request; an ordinary one takes milliseconds
MAX_TEMPLATES = 16  # that are kept compiled
LENGTH = struct.Struct("<Q")  # before every message of `serve`
MAX_LOOP_STEPS = 500_000
MAX_BASE, MAX_EXPONENT = 1 << 16, 16  # of `number ** number`
MAX_PRODUCT = 1 << 24  # of two numbers, or characters of `text * number`
_SEARCH_METHODS = {
    "split",
    "rsplit",
    "partition",
    "rpartition",
    "startswith",
    "endswith",
    "strip",
    "lstrip",
    "rstrip",
    "get",
}
_SEARCH_METHODS |= {"find", "rfind", "index", "rindex", "count", "replace", "removeprefix", "removesuffix"}
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RecursionError,
    AssertionError,  # jinja's own
)


class TemplateFailure(Exception):
    """What is wrong with a template, or with messages for it."""


class Segment(NamedTuple):
    """A part of a rendered prompt: plain text, or one control token's text."""

    text: str
    is_control: bool


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it, with arithmetic that cannot fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, (str, list, tuple)) else value for value in (left, right)]
        is_number = all(isinstance(size, (int, float)) for size in sizes)
        if operator == "**":
            is_small = is_number and abs(sizes[0]) <= MAX_BASE and abs(sizes[1]) <= MAX_EXPONENT
        else:
            is_small = not is_number or sizes[0] * sizes[1] <= MAX_PRODUCT
        if not is_small:
            raise SecurityError(f"{operator} with operands that large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}`, transformers' mark of what a model is trained on: it renders as its body."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _LoopBudget:
    """Counts the steps of all loops of one rendering."""

    def __init__(self) -> None:
        self.num_left = MAX_LOOP_STEPS

    def step(self) -> str:
        self.num_left -= 1
        if self.num_left < 0:
            raise SecurityError(f"more than {MAX_LOOP_STEPS} loop steps")
        return ""


class SandboxedTemplate:
    """A compiled chat template of a model whose control tokens are `controls`."""

    def __init__(self, source: str, controls: Collection[str]) -> None:
        self._controls = sorted(controls, key=len, reverse=True)
        self._secret = str(secrets.randbits(128))  # digits only: no filter changes their case
        self._spelled = re.compile("|".join(map(re.escape, self._controls)) or r"(?!)")
        self._marks = re.compile(f"\ue000{self._secret}:(\\d+)\ue001")
        self._torn_marks = re.compile(f"\ue000{self._secret[:8]}|{self._secret}|{self._secret[-8:]}:\\d+\ue001")
        index = {text: i for i, text in enumerate(self._controls)}
        self._mark_of: Callable[[re.Match], str] = lambda match: f"\ue000{self._secret}:{index[match.group()]}\ue001"
        self._step_name = f"step_{self._secret}"
        environment = _make_environment()
        try:
            tree = environment.parse(source)
            self._rewrite(tree, is_written=True)
            code = environment.compile(tree)
            self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        except (*_RENDER_ERRORS, SyntaxError) as error:
            raise TemplateFailure(self._plain(str(error)) or type(error).__name__) from None

    def render(self, variables: Mapping[str, object], tokens: Mapping[str, str]) -> list[Segment]:
        """The prompt in order. `tokens`: variables that hold a control token, as if the template had written it. The
        template's own failures, its `raise_exception` included, become TemplateFailure."""
        try:
            text = self._generate({**variables, **{name: self._mark(text) for name, text in tokens.items()}})
        except _RENDER_ERRORS as error:
            raise TemplateFailure(self._plain(str(error)) or type(error).__name__) from None
        parts = self._marks.split(text)
        if any(self._torn_marks.search(part) for part in parts[::2]):
            raise TemplateFailure("it alters the text of its own control tokens, which cannot be followed")
        segments = [Segment(self._controls[int(p)], True) if i % 2 else Segment(p, False) for i, p in enumerate(parts)]
        return [segment for segment in segments if segment.text]

    def _generate(self, variables: Mapping[str, object]) -> str:
        parts, num_chars = [], 0
        for part in self._template.generate(variables, **{self._step_name: _LoopBudget().step}):
            parts.append(part)
            num_chars += len(part)
            if num_chars > MAX_OUTPUT_CHARS:
                raise SecurityError(f"more than {MAX_OUTPUT_CHARS} characters")
        return "".join(parts)

    def _mark(self, text: str) -> str:
        """`text`, which is the template's and no message's, with its control tokens marked as such."""
        return self._spelled.sub(self._mark_of, text)

    def _plain(self, text: str) -> str:
        return self._marks.sub(lambda match: self._controls[int(match.group(1))], text)

    def _rewrite(self, node: nodes.Node, is_written: bool) -> None:
        """Mark the template's own texts below `node`, unless they are only looked for, and put a counter into every
        loop."""
        if isinstance(node, nodes.TemplateData):
            node.data = self._mark(node.data)
        elif isinstance(node, nodes.Const) and isinstance(node.value, str) and is_written:
            node.value = self._mark(node.value)
        for child in node.iter_child_nodes():
            self._rewrite(child, is_written and not _is_looked_for(node, child))
        if isinstance(node, nodes.For):
            name = nodes.Name(self._step_name, "load")
            step = nodes.ExprStmt(nodes.Call(name, [], [], None, None)).set_lineno(node.lineno)
            node.body.insert(0, step.set_environment(node.environment))


def _is_looked_for(parent: nodes.Node, child: nodes.Node) -> bool:
    """Whether `child` is compared or searched for by `parent`, rather than possibly written by it."""
    if isinstance(parent, nodes.Call) and isinstance(parent.node, nodes.Getattr):
        return parent.node.attr in _SEARCH_METHODS and child is not parent.node
    if isinstance(parent, nodes.Filter):
        return parent.name == "replace" and child is not parent.node
    if isinstance(parent, nodes.Getitem):
        return child is parent.arg
    if isinstance(parent, nodes.Pair):
        return child is parent.key
    return isinstance(parent, (nodes.Compare, nodes.Test))


def _make_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    del environment.globals["lipsum"]
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def serve() -> None:
    """Answer requests from stdin on stdout until it is closed, within the limits above: one message each way, JSON
    behind its length.

    `{"key", "source", "controls"}` compiles, `{"key", "variables", "tokens"}` renders; the answer is `{"segments"}`, or
    `{"failure"}`, or `{"is_unknown"}` for a key that has to be compiled (again). Over its time the process is ended by
    SIGPROF.
    """
    _limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for who waits
    templates: OrderedDict[str, SandboxedTemplate] = OrderedDict()
    while (request := read_message(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
        answer = _answer(templates, request)
        data = to_message(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _answer(templates: "OrderedDict[str, SandboxedTemplate]", request: Mapping[str, Any]) -> dict[str, Any]:
    key = request["key"]
    try:
        if "source" in request:
            templates[key] = SandboxedTemplate(request["source"], request["controls"])
            while len(templates) > MAX_TEMPLATES:
                templates.popitem(last=False)
            return {"segments": []}
        if key not in templates:
            return {"is_unknown": True}
        templates.move_to_end(key)
        return {"segments": templates[key].render(request["variables"], request["tokens"])}
    except TemplateFailure as failure:
        return {"failure": str(failure)[:2000]}
    except MemoryError:
        return {"failure": f"it needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory"}


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not every system has such limits; time is bounded everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def to_message(value: object) -> bytes:
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(data)) + data


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message, None where there is no whole one any more."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    data = stream.read(LENGTH.unpack(head)[0])
    return json.loads(data.decode("utf-8", "surrogatepass")) if len(data) == LENGTH.unpack(head)[0] else None
