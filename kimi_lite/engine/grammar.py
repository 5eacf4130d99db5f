"""Grammars of answers: JSON by a schema, and tool calls in the model's own syntax with arguments by theirs.

    grammars = Grammars(tokenizer)                      # one for each loaded model
    make = grammars.answer(AnswerForm(schema={"type": "object"}))
    Request(..., constraint=make)                       # a fresh constraint for each answer

llguidance compiles schemas (`engine.json_schema` says which) over the trie of the vocabulary; around its JSON stand
markers, names and indices of calls, which are followed here, token by token. Where a tool may be called but need not
be, text stays untouched (every token may come) until a call begins. Reasoning is never asked about: the engine starts
with the answer. Two limits remain: an answer that is cut by its length is not complete, and JSON of "any value" may
nest as deep as the model likes (the loop guard ends it).
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from kimi_lite.engine.json_schema import Prepared, Schema, SchemaError, prepare
from kimi_lite.engine.types import Constraint
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.stream import THINK, Dialect, dialect_of
from kimi_lite.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

ToolChoice = Literal["auto", "none", "required"] | str  # or the name of the tool that must be called
ANY_OBJECT: Mapping = {"type": "object"}
MAX_CALLS = 64  # of one answer
MAX_COMPILED = 256  # schemas kept
MAX_COMPILE_S = 10.0
MAX_TOOLS_BYTES = 1 << 20  # of the schemas of all tools of a request, as JSON
MAX_FIRST_MASK_S = 0.5  # longer ones would hold up the other answers

# One blank, or a line and its indentation: pretty or not, and no way to write blanks for ever.
_BLANKS = r"(\x20|\n[\x20\t]{0,64})?"


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may be. `tools` as declared to the model."""

    schema: Schema | None = None  # of its content; None: any text
    tools: Sequence[Mapping] = ()
    choice: ToolChoice = "auto"
    strict_tools: frozenset[str] = frozenset()  # whose arguments must follow their schema although none must be called
    has_parallel_calls: bool = True
    num_calls: int = 0  # of the conversation so far
    may_think: bool = False  # the model may open its reasoning itself
    schema_place: str = "schema"  # what errors call it


class _Tool(NamedTuple):
    name: str
    arguments: "LLMatcher"


class Grammars:
    """What one loaded model's answers are held to. Any thread may ask."""

    def __init__(self, tokenizer: Tokenizer, is_fenced: Callable[[], bool] = lambda: False) -> None:
        """is_fenced: whether the arguments of calls stand in code fences, as DeepSeek's V3 and R1 write them."""
        self._tokenizer, self._is_fenced = tokenizer, is_fenced
        self._dialect = dialect_of(tokenizer.special)
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._workers: ThreadPoolExecutor | None = None

    def warm(self) -> None:
        """Build the trie of the vocabulary, once. llguidance keeps the interpreter to itself meanwhile (1.9 s for
        163,840 tokens), so a server does this while it loads. What stands against grammars is said when one is asked
        for."""
        with suppress(KimiLiteError):
            self._require_vocabulary()

    def answer(self, form: AnswerForm) -> Callable[[], Constraint] | None:
        """What makes the constraints of answers of this form; None where anything may come.

        Compiles what is new, which takes milliseconds to seconds. Raises SchemaError where a schema asks for what a
        grammar cannot enforce: always for the content and for tools that must be called or are strict. Arguments of
        others follow their schema where it can be compiled, else are any object.
        """
        names = _callable_names(form)
        if form.schema is None and not names:
            return None
        vocabulary = self._require_vocabulary()
        calls = None
        if names:
            if self._dialect is None:
                raise KimiLiteError("Tools cannot be called: the vocabulary has no markers for calls.")
            calls = _CallSyntax(vocabulary, self._dialect, self._is_fenced())
        content = None
        if form.schema is not None and not _is_forced(form):
            content = self._compile(form.schema, form.schema_place)()
        tools = self._tools(form, names)
        return partial(_AnswerConstraint, vocabulary, calls, form, content, tools)

    def _tools(self, form: AnswerForm, names: set[str]) -> tuple[_Tool, ...]:
        """All at the same time, as far as there are threads."""
        compiled, num_bytes = [], 0
        for i, tool in enumerate(form.tools):
            name, place = tool_name(tool), f"tools.{i}.function.parameters"
            if name in names:
                must_follow = _is_forced(form) or name in form.strict_tools
                parameters = tool["function"].get("parameters")
                num_bytes += len(json.dumps(parameters))
                if num_bytes > MAX_TOOLS_BYTES:
                    if must_follow:
                        raise SchemaError(place, "", f"the schemas of all tools may have {MAX_TOOLS_BYTES:,} bytes")
                    parameters = ANY_OBJECT
                compiled.append((name, self._compile_arguments(parameters, place, must_follow)))
        return tuple(_Tool(name, arguments()) for name, arguments in compiled)

    def _compile_arguments(self, parameters: Schema | None, place: str, must_follow: bool) -> "Callable[[], LLMatcher]":
        try:
            arguments = self._compile(_of_objects(parameters, place), place)
        except SchemaError:
            if must_follow:
                raise
            return self._compile(ANY_OBJECT, place)

        def result() -> "LLMatcher":
            try:
                return arguments()
            except SchemaError:
                if must_follow:
                    raise
                return self._compile(ANY_OBJECT, place)()

        return result

    def _compile(self, schema: Schema, place: str) -> "Callable[[], LLMatcher]":
        """What gives the matcher at its start, to be copied; once for each schema, in a thread of its own."""
        key = json.dumps(schema, ensure_ascii=False)  # the order of properties is the order in which they are written
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return partial(_result, self._compiled[key], place)
        prepared = prepare(schema, place)
        with self._lock:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(2, "kimi-lite-grammar")
            if key not in self._compiled:
                self._compiled[key] = self._workers.submit(_compiled, self._vocabulary, prepared)
            future = self._compiled[key]
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return partial(_result, future, place)

    def _require_vocabulary(self) -> "_Vocabulary":
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary.of(self._tokenizer)
            return self._vocabulary


def _callable_names(form: AnswerForm) -> set[str]:
    """The tools that may be called."""
    declared = {tool_name(tool) for tool in form.tools}
    if form.choice == "none":
        return set()
    return declared if form.choice in ("auto", "required") else declared & {form.choice}


def _is_forced(form: AnswerForm) -> bool:
    return form.choice not in ("auto", "none")


def tool_name(tool: Mapping) -> str:
    """Of an OpenAI-shaped declaration."""
    return tool["function"]["name"]


def _of_objects(parameters: Schema | None, place: str) -> Schema:
    """Arguments are an object, whether their schema says so or not; SchemaError where it says that they are none."""
    if not parameters or isinstance(parameters, bool):
        return ANY_OBJECT if parameters is not False else False
    types = parameters.get("type", "object")
    if "object" not in (types if isinstance(types, list) else [types]):
        raise SchemaError(place, "type", f"arguments are an object, not {types!r:.40}")
    return {**parameters, "type": "object"}


def _compiled(vocabulary: "_Vocabulary", prepared: Prepared) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    options = {"whitespace_pattern": _BLANKS, "lenient": False, "coerce_one_of": False}
    if prepared.may_escape:
        options["json_allow_general_unicode_escapes"] = True
    else:
        options["json_allowed_escapes"] = '"\\bfnrt'
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(prepared.schema), overrides=options)
    matcher = LLMatcher(vocabulary.trie, grammar, log_level=0, limits=limits)
    started_s = time.thread_time()
    trial = matcher.deep_copy()
    if not trial.is_error():
        trial.compute_bitmask()
    if trial.is_error():
        raise KimiLiteError(trial.get_error().strip().split("\n")[0])
    if time.thread_time() - started_s > MAX_FIRST_MASK_S:
        raise KimiLiteError("it is too complex: its first token alone takes too long")
    return matcher


def _result(compiled: "Future[LLMatcher]", place: str) -> "LLMatcher":
    try:
        return compiled.result(MAX_COMPILE_S)
    except TimeoutError:
        raise SchemaError(place, "", f"it is too complex: compiling it takes more than {MAX_COMPILE_S:.0f} s") from None
    except KimiLiteError as error:
        raise SchemaError(place, "", f"it cannot be made a grammar: {error.message}"[:400]) from None


@dataclass(frozen=True, slots=True, eq=False)
class _Vocabulary:
    """What masks are made of."""

    trie: "LLTokenizer"
    num_words: int  # uint32 of a mask
    eos_ids: tuple[int, ...]
    special: Mapping[str, int]
    control_ids: frozenset[int]  # no text
    id_of_bytes: Mapping[bytes, int]  # tokens of plain text
    bytes_of_id: Sequence[bytes] = field(repr=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "_Vocabulary":
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise KimiLiteError("Answers by a grammar need llguidance.", "pip install 'kimi-lite[server]'") from None
        special = set(tokenizer.special.values()) | tokenizer.eos_ids
        tokens = [tokenizer.decode_bytes(i) for i in range(tokenizer.vocab_size)]
        special |= {i for i, data in enumerate(tokens) if tokenizer.is_control(i) or not data}
        eos_ids = tuple(sorted(tokenizer.eos_ids))
        if not eos_ids:
            raise KimiLiteError("Answers by a grammar cannot end: the vocabulary has no token that ends a turn.")
        source = _TokenSource(eos_ids[0], tokens, sorted(special), tokenizer)
        trie = LLTokenizer(TokenizerWrapper(source), eos_token=list(eos_ids))
        plain = {data: i for i, data in enumerate(tokens) if i not in special}
        num_words = -(-tokenizer.vocab_size // 32)
        return cls(trie, num_words, eos_ids, tokenizer.special, frozenset(special), plain, tokens)

    def bits(self, ids: Iterable[int]) -> np.ndarray:
        """uint32 (num_words,) in which only these tokens are set."""
        words = np.zeros(self.num_words, np.uint32)
        for i in ids:
            words[i >> 5] |= np.uint32(1 << (i & 31))
        return words


class _TokenSource:
    """A tokenizer as llguidance wants to see it."""

    bos_token_id = None

    def __init__(self, eos_id: int, tokens: list[bytes], special: list[int], tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.tokens, self.special_token_ids = eos_id, tokens, special
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class _Json:
    """JSON by a schema, as far as it has come."""

    def __init__(self, vocabulary: _Vocabulary, matcher: "LLMatcher") -> None:
        self._matcher = matcher.deep_copy()
        self._num_words = vocabulary.num_words
        self._no_eos = ~vocabulary.bits(vocabulary.eos_ids)

    @property
    def is_whole(self) -> bool:
        return self._matcher.is_accepting()

    def bits(self) -> np.ndarray:
        """Tokens that go on with it; not the end."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._num_words] & self._no_eos
        self._require_sound()
        return words

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise KimiLiteError(
                f"The answer's grammar has failed: {self._matcher.get_error().strip().splitlines()[0][:200]}",
                "Ask for a simpler schema.",
            )


Script = tuple[bytes | int, ...]  # text, and control tokens by id


class _Scripts:
    """What is written word for word: one of several scripts, each of which says which tool it calls."""

    def __init__(self, vocabulary: _Vocabulary, scripts: Iterable[tuple[Script, _Tool]]) -> None:
        self._vocabulary = vocabulary
        self._left = [(tuple(part for part in script if part != b""), tool) for script, tool in scripts]

    @property
    def tool(self) -> _Tool | None:
        """Whose script has been written to its end."""
        return next((tool for parts, tool in self._left if not parts), None)

    def bits(self) -> np.ndarray:
        ids: set[int] = set()
        for parts, _ in self._left:
            ids |= {parts[0]} if isinstance(parts[0], int) else self._beginnings(parts[0])
        return self._vocabulary.bits(ids)

    def takes(self, token_id: int) -> bool:
        """Whether this token may come next."""
        return bool(self.bits()[token_id >> 5] >> np.uint32(token_id & 31) & 1)

    def accept(self, token_id: int) -> None:
        data, left = self._vocabulary.bytes_of_id[token_id], []
        for (first, *others), tool in self._left:
            if first == token_id:
                left.append((tuple(others), tool))
            elif isinstance(first, bytes) and self.takes(token_id) and first.startswith(data):
                rest = first[len(data) :]
                left.append(((rest, *others) if rest else tuple(others), tool))
        assert left, token_id
        self._left = left

    def _beginnings(self, text: bytes) -> set[int]:
        lookup = self._vocabulary.id_of_bytes
        return {lookup[text[:n]] for n in range(1, len(text) + 1) if text[:n] in lookup}


class _CallSyntax:
    """How the model writes a call. Fenced: DeepSeek's V3 and R1 name the tool behind the separator, arguments in a code
    fence."""

    def __init__(self, vocabulary: _Vocabulary, dialect: Dialect, is_fenced: bool) -> None:
        special = vocabulary.special
        self._vocabulary, self._has_ids, self._is_fenced = vocabulary, dialect.has_ids, is_fenced
        self._arguments_begin, self._call_end = special[dialect.arguments_begin], special[dialect.call_end]
        self.section_begin = tuple(special[name] for name in dialect.section_begin if name in special)
        self.section_end = tuple(special[name] for name in dialect.section_end if name in special)
        self.call_begin = special[dialect.call_begin]

    def headers(self, tools: Sequence[_Tool], index: int) -> _Scripts:
        """From the marker of a call to its arguments; `index`: which call of the conversation it is."""
        return _Scripts(self._vocabulary, [(self._header(tool.name, index), tool) for tool in tools])

    def tail(self, tool: _Tool) -> _Scripts:
        """From the arguments to the call's end."""
        return _Scripts(self._vocabulary, [((b"\n```" if self._is_fenced else b"", self._call_end), tool)])

    def _header(self, name: str, index: int) -> Script:
        if self._has_ids:
            return (f"functions.{name}:{index}".encode(), self._arguments_begin)
        if self._is_fenced:
            return (b"function", self._arguments_begin, f"{name}\n```json\n".encode())
        return (name.encode(), self._arguments_begin)


_State = Literal["start", "text", "content", "between calls", "header", "arguments", "tail", "end"]


class _AnswerConstraint:
    """One answer's state: free text until a call begins, or content by a schema, or calls."""

    def __init__(
        self,
        vocabulary: _Vocabulary,
        calls: _CallSyntax | None,
        form: AnswerForm,
        content: "LLMatcher | None",
        tools: tuple[_Tool, ...],
    ) -> None:
        self._vocabulary, self._calls, self._tools, self._form = vocabulary, calls, tools, form
        self._content = None if content is None else _Json(vocabulary, content)
        self._is_free = content is None and not _is_forced(form)  # text may come as well as calls
        self._state: _State = "text" if self._is_free else "start"
        self._think_id = vocabulary.special.get(THINK) if form.may_think else None
        self._num_calls, self._is_in_section = 0, False
        self._scripts: _Scripts | None = None  # of the header, then of the tail
        self._arguments: _Json | None = None

    def allowed(self) -> np.ndarray | None:
        bits = self._bits()
        if bits is not None and not bits.any():
            raise KimiLiteError("The answer cannot go on within its grammar: no token of the vocabulary spells it.")
        return bits

    def _bits(self) -> np.ndarray | None:
        match self._state:
            case "text":
                return None
            case "start":
                return self._start_bits()
            case "content":
                return self._content.bits() | (self._end_bits() if self._content.is_whole else 0)
            case "between calls":
                return self._vocabulary.bits(self._next_ids())
            case "header" | "tail":
                return self._scripts.bits()
            case "arguments":
                return self._arguments.bits() | (self._scripts.bits() if self._arguments.is_whole else 0)
            case "end":
                return self._end_bits()

    def accept(self, token_id: int) -> None:
        """Also a marker that came while the model reasoned and so ended its reasoning."""
        match self._state:
            case "start" | "text":
                self._start(token_id)
            case "content":
                self._go_on_with_content(token_id)
            case "between calls":
                self._go_on_between_calls(token_id)
            case "header":
                self._scripts.accept(token_id)
                if (tool := self._scripts.tool) is not None:
                    self._arguments, self._state = _Json(self._vocabulary, tool.arguments), "arguments"
                    self._scripts = self._calls.tail(tool)
            case "arguments" | "tail":
                self._go_on_with_arguments(token_id)

    def _start_bits(self) -> np.ndarray:
        ids = set() if self._think_id is None else {self._think_id}
        if self._calls is not None:
            ids |= set(self._calls.section_begin) or {self._calls.call_begin}
        bits = self._vocabulary.bits(ids)
        return bits if self._content is None else bits | self._content.bits()

    def _end_bits(self) -> np.ndarray:
        return self._vocabulary.bits(self._vocabulary.eos_ids)

    def _next_ids(self) -> set[int]:
        most = MAX_CALLS if self._form.has_parallel_calls else 1
        ids = {self._calls.call_begin} if self._num_calls < most else set()
        if self._is_in_section:
            return ids | (set(self._calls.section_end) if self._num_calls else set())
        return ids | set(self._vocabulary.eos_ids)

    def _start(self, token_id: int) -> None:
        if self._calls is not None and token_id in self._calls.section_begin:
            self._state, self._is_in_section = "between calls", True
        elif self._calls is not None and token_id == self._calls.call_begin:
            self._begin_call()
        elif self._state == "start" and token_id == self._think_id:
            self._think_id = None
        elif self._state == "start" and self._content is not None and token_id not in self._vocabulary.control_ids:
            self._state = "content"
            self._content.accept(token_id)

    def _go_on_with_content(self, token_id: int) -> None:
        if token_id in self._vocabulary.eos_ids:
            self._state = "end"
        else:
            self._content.accept(token_id)

    def _go_on_between_calls(self, token_id: int) -> None:
        if token_id == self._calls.call_begin:
            self._begin_call()
        else:
            self._end_calls()

    def _begin_call(self) -> None:
        self._scripts = self._calls.headers(self._tools, self._form.num_calls + self._num_calls)
        self._num_calls, self._state = self._num_calls + 1, "header"

    def _go_on_with_arguments(self, token_id: int) -> None:
        if self._state == "arguments" and not (self._arguments.is_whole and self._scripts.takes(token_id)):
            self._arguments.accept(token_id)
            return
        self._state = "tail"
        self._scripts.accept(token_id)
        if self._scripts.tool is not None:
            self._state = "between calls"
            if not self._is_in_section and self._is_free:
                self._end_calls()

    def _end_calls(self) -> None:
        self._is_in_section = False
        self._state = "text" if self._is_free and self._form.has_parallel_calls else "end"
