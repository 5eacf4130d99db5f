"""How many prompt tokens may go into a step so that the answers that run go on in time: learnt from the steps so far.

A step takes about `decode_s + num_prompt_tokens * token_s`. Both are moving averages; a chunk is what fits into the gap
that is allowed between two tokens of an answer.
"""

from kimi_lite.native.latent_rows import PAGE_TOKENS

_WEIGHT = 0.2  # of the newest step


class Pace:
    """`max_gap_s`: the longest time a running answer should wait for its next token because of another's prompt."""

    def __init__(self, max_gap_s: float) -> None:
        assert max_gap_s > 0, max_gap_s
        self._max_gap_s = max_gap_s
        self._decode_s: float | None = None
        self._token_s: float | None = None

    def max_prompt_tokens(self) -> int:
        """Whole pages, at least one: a prompt always goes on, however short the gap."""
        if self._token_s is None:
            return 4 * PAGE_TOKENS
        left_s = self._max_gap_s - (self._decode_s or 0.0)
        return max(1, int(left_s / max(self._token_s, 1e-9)) // PAGE_TOKENS) * PAGE_TOKENS

    def learn(self, step_s: float, num_decoding: int, num_prompt_tokens: int) -> None:
        """One step: its time, the sequences that got their next token, and the prompt tokens in it."""
        if num_prompt_tokens == 0:
            self._decode_s = _average(self._decode_s, step_s)
        elif num_prompt_tokens >= PAGE_TOKENS // 2:  # shorter ones are mostly what a step costs anyway
            decode_s = min(self._decode_s or 0.0, step_s) if num_decoding else 0.0
            self._token_s = _average(self._token_s, (step_s - decode_s) / num_prompt_tokens)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
