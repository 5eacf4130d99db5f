"""A stage's process: `python -m kimi_lite.tools.gpu_check.stage NAME SETTINGS`. Results go to its output."""

import os
import sys
import time

from kimi_lite.tools.gpu_check.settings import Settings


def main() -> None:
    name, settings = sys.argv[1], Settings.from_json(sys.argv[2])
    if settings.is_stand_in:
        os.environ["TRITON_INTERPRET"] = "1"
    _fail(settings.fault)
    run(name, settings)


def run(name: str, settings: Settings) -> None:
    """Imports what the stage needs and nothing else."""
    module, _, function = STAGES[name].partition(":")
    __import__(module)
    getattr(sys.modules[module], function)(settings)


STAGES = {
    name: f"kimi_lite.tools.gpu_check.{place}"
    for name, place in {
        "machine": "machine:measure",
        "launchers": "machine:compare_launchers",
        "file": "slices:make_file",
        "compile": "machine:compile_kernels",
        "kernels": "kernels:check",
        "sanitizer": "kernels:sanitize",
        "types": "kernels:bandwidths",
        "graphs": "tiny:graphs_are_plain_calls",
        "hits": "tiny:hits_are_misses",
        "soak": "tiny:soak",
        "shapes": "tiny:many_shapes",
        "memory": "tiny:out_of_memory",
        "copies": "tiny:failing_copies",
        "parts": "slices:time_parts",
        "decode": "slices:decode",
        "prompts": "slices:prompts",
        "trace": "slices:trace_tokens",
    }.items()
}


def _fail(fault: str) -> None:
    if fault == "error":
        raise RuntimeError("an error on request")
    if fault == "hang":
        time.sleep(3600)
    if fault == "crash":
        os.abort()


if __name__ == "__main__":
    main()
