"""The error a user can cause: what failed with need and have in numbers, and what to try. Only `cli.py` catches
it."""


class KimiLiteError(Exception):
    """`message` says what failed, with need and have; `hint` says what to do about it, one to three commands."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class MemoryEnded(KimiLiteError):
    """With less at a time it may work."""


class Broken(KimiLiteError):
    """Nothing works any more until the process has ended."""
