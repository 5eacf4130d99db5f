"""ik_llama.cpp on the same file, in a process of its own: its libraries have the names and symbols of llama.cpp's, and
one process cannot hold both.

    kimi-lite bench --compare ik_llama                                      # the wheel ik-llama-cpp-python: AVX2 code
    kimi-lite bench --compare ik_llama --ik-library build/src/libllama.so   # a native build, of the wheel's version

The process is this file as a program. It reads a request, one line of JSON, from its input and answers with one line:
`run` is `llama.Llama.run` there, timed there. Its threads are watched there too, so a turn that was disturbed is known.
The wheel is found where this Python finds packages (PYTHONPATH counts); it declares the C structures, so a library must
be of its version.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.bench.llama import BATCH_TOKENS, Llama
from kimi_lite.tools.bench.measure import read_waited_s
from kimi_lite.tools.bench.ours import Run
from kimi_lite.tools.bench.plan import BenchTest, Prompt

NAME, _PACKAGE, _LIBRARY = "ik_llama.cpp", "ik-llama-cpp-python", "IK_LLAMA_CPP_LIB_PATH"
_IS_ERROR = re.compile(r"error|assert|failed", re.IGNORECASE)
_MLA = 3  # its own default for this architecture, which its programs give the model and the context
_CODE = (("AVX512_VNNI", "AVX-512 VNNI"), ("AVX512", "AVX-512"), ("AVX_VNNI", "AVX-VNNI"), ("AVX2", "AVX2"))


class IkLlama:
    """The process with a loaded model, and the caller's side of its pipe."""

    name = NAME

    def __init__(
        self, path: Path, num_threads: int, context_length: int, num_sequences: int = 1, library: Path | None = None
    ) -> None:
        """library: libllama.so of a native build; None: the wheel's. Raises KimiLiteError."""
        self._library = library
        command = [sys.executable, "-m", "kimi_lite.tools.bench.ik_llama"]
        environment = os.environ | {"GGML_NO_BACKTRACE": "1"} | ({_LIBRARY: str(library)} if library else {})
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=environment,
            text=True,
        )
        try:
            opened = self._ask("open", str(path), num_threads, context_length, num_sequences)
        except BaseException:
            self.close()
            raise
        source = f"library {library}" if library else f"wheel {opened['version']}"
        self.description = f"{NAME}, {source}, {opened['code']} code"

    def run(self, test: BenchTest, prompts: Sequence[Prompt]) -> Run:
        """As `ours.Ours.run`."""
        answer = self._ask("run", asdict(test), [asdict(prompt) for prompt in prompts])
        return Run(**answer | {"gaps_s": tuple(answer["gaps_s"])})

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def _ask(self, *request: object) -> dict:
        """Raises KimiLiteError for what the process says, and where it ended."""
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise KimiLiteError(
                f"{NAME} ended while it was asked to {request[0]} the model (exit code {code}): {self._last_words()}",
                f"A library must be of the version of {_PACKAGE}."
                if self._library
                else "Leave ik_llama out of --compare.",
            )
        answer = json.loads(line)
        if "problem" in answer:
            raise KimiLiteError(answer["problem"], answer["remedy"])
        return answer

    def _last_words(self) -> str:
        """The last line of its messages that speaks of an error, or the last one."""
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages if line.strip()] or ["it said nothing."]
        return next((line for line in reversed(lines) if _IS_ERROR.search(line)), lines[-1])


class _IkModel(Llama):
    """In the process: llama.cpp's calls, under ik_llama.cpp's older names."""

    def __init__(self, path: Path, num_threads: int, context_length: int, num_sequences: int) -> None:
        self._api = api = _import_binding()
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.mla = _MLA
        self._model = api.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise KimiLiteError(f"{NAME} cannot load {path}.", "It reads no TQ1_0 and TQ2_0; leave out --compare.")
        params = api.llama_context_default_params()
        params.n_ctx = num_sequences * -(-context_length // 256) * 256
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = num_threads
        params.n_seq_max, params.mla_attn = num_sequences, _MLA
        params.flash_attn = num_sequences == 1  # with several, 0.1.5 stops at GGML_ASSERT(S > 0)
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise KimiLiteError(f"{NAME} cannot make a context of {params.n_ctx:,} tokens.", "Use a smaller -d.")
        self._begin(num_sequences)

    def _remove(self, sequence: int, length: int) -> None:
        self._api.llama_kv_cache_seq_rm(self._context, sequence, length, -1)

    def code(self) -> str:
        """For which CPU the library was compiled."""
        system_info = self._api.llama_print_system_info().decode()
        has = dict(part.strip().split(" = ") for part in system_info.split("|") if "=" in part)
        return next((code for flag, code in _CODE if has.get(flag) == "1"), "plain")


def _import_binding():
    """The wheel's declarations of the C functions, with those that it leaves out. Raises KimiLiteError."""
    try:
        import ik_llama_cpp._ctypes_api as api
    except (ImportError, OSError, AttributeError) as error:
        raise KimiLiteError(
            f"{NAME} is wanted for comparison, and its binding cannot be imported: {error}.",
            'Say: pip install "kimi-lite[ik]".',
        ) from error
    for name, arguments, result in (
        ("llama_kv_cache_seq_rm", [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32], ctypes.c_bool),
        ("llama_synchronize", [ctypes.c_void_p], None),
        ("llama_print_system_info", [], ctypes.c_char_p),
    ):
        function = getattr(api._lib, name)
        function.argtypes, function.restype = arguments, result
        setattr(api, name, function)
    return api


def _version() -> str:
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:  # found by PYTHONPATH
        import ik_llama_cpp

        return ik_llama_cpp.__version__


def _serve() -> None:
    """Answers requests until the input ends. What the library prints to stdout goes where its messages go."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model: _IkModel | None = None
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            if what == "open":
                path, *numbers = arguments
                model = _IkModel(Path(path), *numbers)
                answer = {"version": _version(), "code": model.code()}
            else:
                assert model is not None
                test, prompts = arguments
                waited_s = read_waited_s()
                fresh = [Prompt(tuple(prompt["prefix"]), tuple(prompt["fresh"])) for prompt in prompts]
                answer = asdict(model.run(BenchTest(**test), fresh)) | {"waited_s": read_waited_s() - waited_s}
        except KimiLiteError as error:
            answer = {"problem": error.message, "remedy": error.hint}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
