"""Requests in, tokens out. `step` is the whole engine: schedule, run, sample, collect.

    with load("model.gguf") as engine:
        for token in engine.generate([Request("a", prompt_ids)]): print(token.text, end="")

Not thread-safe, but for `cancel`, which any thread or signal handler may call. `engine.loader.load` makes an engine;
its caller closes it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Protocol

import numpy as np

from kimi_lite.engine.grammar import Grammars
from kimi_lite.engine.loop_guard import LoopGuard
from kimi_lite.engine.pace import Pace
from kimi_lite.engine.sampler import Sampler, logprobs
from kimi_lite.engine.scheduler import Scheduler, Work, make_batch
from kimi_lite.engine.sequence import Sequence
from kimi_lite.engine.types import ContextExceeded, FinishReason, ModelInfo, Request, Stats, Token
from kimi_lite.engine.vision import Vision
from kimi_lite.engine.watch import OnPrefill, StepWatch
from kimi_lite.errors import Broken, KimiLiteError, MemoryEnded
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, Cancelled
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.plan.types import Plan
from kimi_lite.text.stream import END_THINK, Piece, StreamParser
from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.units import tokens_flag

_ANSWER_TOKENS = 256  # that a recommended context leaves for the answer
_OF_REQUESTS = (KimiLiteError, MemoryError)  # what a pass may raise that another pass need not; but Broken
OnProgress = Callable[[str, int, int], None]  # what is being loaded, units done, units in all


class Model(Protocol):
    """What the engine needs of a model: `model.cpu.transformer.Transformer`, or the hybrid path's."""

    max_batch_tokens: int  # rows of one forward pass

    def forward(self, batch: Batch, should_stop: Callable[[], bool] | None = None) -> np.ndarray:
        """Asks `should_stop` before every layer of a long batch, which is also how far the prompt is known to be."""

    def counters(self) -> Mapping[str, float]:
        """What happened since the model was loaded, by name; nothing where nothing is counted."""

    def heat(self) -> np.ndarray | None:
        """float32 (layers, experts): how much each routed expert was used lately; None where that is not counted."""

    def close(self) -> None: ...


class Closeable(Protocol):
    def close(self) -> None: ...


class Engine:
    """A loaded model, its cache and the requests in progress."""

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        context_length: int,
        info: ModelInfo,
        max_step_tokens: int | None = None,
        clock_s: Callable[[], float] = time.perf_counter,
        holdings: Many[Closeable] = (),
        plan: Plan | None = None,
        max_context_length: int | None = None,
        max_running: int | None = None,
        max_gap_s: float | None = None,
        vision: Vision | None = None,
    ) -> None:
        """max_step_tokens: default and most, what the model takes at once. holdings: closed, in order, after the model.
        plan: what lies where, for front ends to show. max_context_length: what the model is made for; None: not
        known. max_running: sequences at the same time. max_gap_s: how long a running answer may wait for its next token
        while another's prompt is read; None: as long as a whole step of prompt takes. vision: for images; closed
        after the model. None: it sees none."""
        assert context_length <= kv.num_pages * PAGE_TOKENS, (context_length, kv.num_pages)
        assert max_step_tokens is None or max_step_tokens <= model.max_batch_tokens, max_step_tokens
        self.model, self.tokenizer, self.template, self.info = model, tokenizer, template, info
        self.vision = vision
        self.kv, self.context_length, self.plan = kv, context_length, plan
        self.max_context_length = max_context_length
        self.scheduler = Scheduler(kv, max_step_tokens or model.max_batch_tokens, max_running)
        self.pace = None if max_gap_s is None else Pace(max_gap_s)
        self.clock_s = clock_s
        self.grammars = Grammars(tokenizer, lambda: template.facts.fences_arguments)
        self.is_closed = False
        self._holdings = holdings
        self._live: dict[str, Sequence] = {}
        self._cancelled: set[str] = set()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do: no request waits or runs."""
        return not self._live

    def close(self) -> None:
        """End what runs, then the model's threads, then unmap its files. A second call does nothing."""
        if self.is_closed:
            return
        self.is_closed = True
        for sequence in list(self._live.values()):
            self._drop(sequence)
        with ExitStack() as stack:  # one that fails does not keep the others open
            for holding in (*reversed(self._holdings), *([self.vision] if self.vision else []), self.model):
                stack.callback(holding.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def counters(self) -> Mapping[str, float]:
        """What happened since the model was loaded, by name: of the cache, of images and of the model."""
        seen = self.vision.counters() if self.vision is not None else {}
        return {**self.kv.counters(), **seen, **self.model.counters()}

    def generate(self, requests: Many[Request], on_prefill: OnPrefill | None = None) -> Iterator[Token]:
        """Run requests to their ends, together. Whatever ends the iteration ends them; what they computed stays
        cached."""
        try:
            for request in requests:
                self.add(request)
            while any(request.id in self._live for request in requests):
                for token in self.step(on_prefill):
                    yield token
                    if token.failure is not None:
                        raise token.failure
        finally:
            for request in requests:
                if request.id in self._live:
                    self._drop(self._live[request.id])
                self._cancelled.discard(request.id)

    def cancel(self, request_id: str) -> None:
        """End a request with finish reason "cancelled", within a layer's time; may come before the request itself."""
        self._cancelled.add(request_id)

    def add(self, request: Request) -> None:
        """Let a request into the queue; refused when it can never fit."""
        assert request.id not in self._live, request.id
        assert not self.is_closed
        self.require_room(request)
        assert request.max_reasoning_tokens is None or END_THINK in self.tokenizer.special, request.id
        parser = StreamParser(
            self.tokenizer,
            request.starts_in_reasoning,
            request.sampling.stop,
            request.tools,
            request.num_calls,
            request.is_plain,
        )
        sampler = Sampler(request.sampling, request.prompt_ids, self.tokenizer.vocab_size)
        guard = request.loop_limits and LoopGuard(request.loop_limits, request.earlier_calls)
        constraint = request.constraint and request.constraint()
        sequence = Sequence(request, sampler, parser, self.clock_s(), constraint, guard)
        self._live[request.id] = sequence
        self.scheduler.add(sequence)

    def require_room(self, request: Request) -> None:
        """Refuse a request that can never fit."""
        need, have = len(request.prompt_ids), self.context_length
        assert need > 0, request.id
        if need >= have:
            most = self.max_context_length or math.inf
            wanted = -(-(need + _ANSWER_TOKENS) // 1024) * 1024
            longer = f"-c {tokens_flag(min(wanted, most))} or " if need < most else ""
            raise ContextExceeded(
                f"The prompt and the answer's first token need a context of {need + 1:,} tokens; it has {have:,}.",
                f"Try {longer}a shorter prompt.",
            )

    def step(self, on_prefill: OnPrefill | None = None) -> list[Token]:
        """One pass of the model over every sequence that can run; the tokens it gave, of all requests.

        Where a pass fails, each of its sequences gets one alone, and who fails alone is ended with that failure. Raises
        what breaks the model: Broken, and every error that has no words for a user.
        """
        tokens = self._end_cancelled()
        work = self.scheduler.schedule(self.pace and self.pace.max_prompt_tokens())
        if not work:
            return tokens
        self._start_clocks(work)
        try:
            return tokens + self._run(work, on_prefill)
        except Cancelled:
            return tokens + self._end_cancelled()
        except Broken:
            raise
        except _OF_REQUESTS as error:
            if len(work) == 1:
                return tokens + self._end_failed(work[0].sequence, _in_words(error))
        return tokens + self._run_each(work, on_prefill)  # behind the `except`: the error holds what was allocated

    def _run_each(self, work: list[Work], on_prefill: OnPrefill | None) -> list[Token]:
        """The work of a step that failed, a pass for each sequence."""
        tokens: list[Token] = []
        for item in work:
            try:
                tokens += self._run([item], on_prefill)
            except Cancelled:
                return tokens + self._end_cancelled()
            except Broken:
                raise
            except _OF_REQUESTS as error:
                tokens += self._end_failed(item.sequence, _in_words(error))
        return tokens

    def _run(self, work: list[Work], on_prefill: OnPrefill | None) -> list[Token]:
        """One pass of the model. One that fails leaves the sequences as they were."""
        started_s = self.clock_s()
        watch = StepWatch(work, self.kv.num_layers, self._cancelled, on_prefill)
        logits = self.model.forward(make_batch(work), watch)  # (sequences at their end, vocab)
        sampled = [item.sequence for item in work if item.is_last]
        assert len(logits) == len(sampled), (logits.shape, len(sampled))
        if self.pace is not None:
            num_decoding = sum(item.num_tokens for item in work if item.is_generated)
            num_prompt_tokens = sum(item.num_tokens for item in work) - num_decoding
            self.pace.learn(self.clock_s() - started_s, num_decoding, num_prompt_tokens)
        self.scheduler.advance(work)
        return [token for sequence, row in zip(sampled, logits, strict=True) for token in self._sample(sequence, row)]

    def _sample(self, sequence: Sequence, logits: np.ndarray) -> list[Token]:
        """Choose the next token and say what it adds to the output. Sampler, grammar and parser are the request's own:
        whatever fails in them ends it alone."""
        logits = logits[: self.tokenizer.vocab_size]
        try:
            token_id = self._choose(sequence, logits)
        except Exception as error:
            return self._end_failed(sequence, error)
        try:
            return self._tell(sequence, token_id, logits)
        except Exception as error:
            return self._end_failed(sequence, error, is_parsed=False)

    def _tell(self, sequence: Sequence, token_id: int, logits: np.ndarray) -> list[Token]:
        sequence.append(token_id, self.clock_s())
        is_end = token_id in self.tokenizer.eos_ids and not sequence.request.sampling.ignore_eos
        was_reasoning = sequence.is_reasoning
        pieces = [] if is_end else sequence.parser.feed(token_id)
        if was_reasoning and sequence.parser.kind == "tool_call" and sequence.constraint is not None:
            sequence.constraint.accept(token_id)  # a call began without </think>
        finish_reason = "stop" if is_end else self._finish_reason(sequence)
        if finish_reason is not None:
            pieces += sequence.parser.finish()
            self._drop(sequence)
        if finish_reason == "stop" and sequence.parser.tool_calls:
            finish_reason = "tool_calls"
        first, *rest = self._tokens(sequence, token_id, pieces, finish_reason)
        if (num_top := sequence.request.sampling.num_logprobs) is not None:
            first = replace(first, logprobs=logprobs(logits, token_id, num_top))
        return [first, *rest]

    def _choose(self, sequence: Sequence, logits: np.ndarray) -> int:
        """`logits` (vocab,) -> the next token, by the sampler within the grammar; the end of a thinking budget is
        written without being asked."""
        if sequence.is_thought_out:
            token_id = self.tokenizer.special[END_THINK]
            sequence.sampler.forced(token_id)
            return token_id
        if sequence.constraint is None or sequence.is_reasoning:
            return sequence.sampler.sample(logits)
        token_id = sequence.sampler.sample(logits, sequence.constraint.allowed())
        sequence.constraint.accept(token_id)
        return token_id

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.parser.is_stopped:
            return "stop"
        if sequence.is_in_a_loop:
            return "repetition"
        is_at_limit = sequence.num_generated == sequence.request.sampling.max_tokens
        return "length" if is_at_limit or len(sequence.token_ids) >= self.context_length else None

    def _tokens(
        self, sequence: Sequence, token_id: int | None, pieces: list[Piece], reason: FinishReason | None
    ) -> list[Token]:
        """One `Token` per piece, at least one; the id goes with the first and the finish reason with the last."""
        stats, name = sequence.stats(self.clock_s()), sequence.request.id
        pieces = pieces or [Piece(sequence.parser.kind)]
        ids, reasons = [token_id] + [None] * len(pieces), [None] * (len(pieces) - 1) + [reason]
        tokens = [_token(name, i, p, r, stats) for i, p, r in zip(ids, pieces, reasons, strict=False)]
        if reason == "stop":
            tokens[-1] = replace(tokens[-1], stopped_by=sequence.parser.stopped_by)
        return tokens

    def _end_failed(self, sequence: Sequence, error: Exception, is_parsed: bool = True) -> list[Token]:
        """What was held back of its text, and the failure; is_parsed: it was not the parser that failed."""
        if sequence.request.id in self._live:
            self._drop(sequence)
        *rest, last = self._tokens(sequence, None, sequence.parser.finish() if is_parsed else [], "error")
        return [*rest, replace(last, failure=error)]

    def _end_cancelled(self) -> list[Token]:
        tokens = []
        for sequence in [self._live[name] for name in self._cancelled & self._live.keys()]:
            self._drop(sequence)
            tokens += self._tokens(sequence, None, sequence.parser.finish(), "cancelled")
        return tokens

    def _start_clocks(self, work: list[Work]) -> None:
        for sequence, _ in work:
            if sequence.started_s is None:
                sequence.started_s = self.clock_s()

    def _drop(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self._live[sequence.request.id]
        self._cancelled.discard(sequence.request.id)


def _in_words(error: Exception) -> Exception:
    """An error of `_OF_REQUESTS` for the user. Where memory ended a new one, which holds nothing of the pass."""
    if isinstance(error, MemoryEnded):
        return MemoryEnded(error.message, error.hint)
    if isinstance(error, MemoryError):
        return MemoryEnded(f"RAM ran out in a step: {error}", "Try a shorter prompt, or close what else uses memory.")
    return error


def _token(name: str, token_id: int | None, piece: Piece, reason: FinishReason | None, stats: Stats) -> Token:
    call_index = None if piece.call_index < 0 else piece.call_index
    error = piece.error or None
    return Token(
        name, token_id, piece.text, piece.kind, reason, stats, piece.call, call_index, error, unsaid=piece.unsaid
    )
