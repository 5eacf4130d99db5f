"""What a GPU can do with kimi-lite, in a few minutes on a machine that is lent: one command.

    python -m tools.gpu_check --minutes 8 --out DIR                        # on the machine
    python -m tools.gpu_check --prepare DIR --triton 3.6.0 --arch 90       # before, anywhere: kernels, wheels
    python -m tools.gpu_check --minutes 8 --out DIR --carried DIR          # on the machine, with what was prepared
    python -m tools.gpu_check --stand-in --out DIR                         # without a GPU: tries the script itself

Stages are processes that end at their limits; nothing stops at a failure. Every result is a line of DIR/results.jsonl
the moment it is known; a table and one line of JSON come last. Exit code 1 where anything failed. Uses nothing but the
standard library until a stage begins.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import prepare, report
from .schedule import Results, Stage, run_groups
from .settings import Settings

_SHARDS = max(1, min(8, (os.cpu_count() or 2) // 2))
GROUPS = (  # limits add up to 8 minutes: a stage that hangs takes no other's time
    (Stage("machine", 45), Stage("file", 60)),
    (Stage("compile", 40), Stage("launchers", 30)),
    (Stage("kernels", 65, _SHARDS),),
    tuple(Stage(name, 50) for name in ("graphs", "hits", "soak", "shapes", "copies")),
    (Stage("memory", 20),),
    (Stage("sanitizer", 25),),
    (Stage("types", 35),),
    (Stage("parts", 35),),
    (Stage("decode", 70),),
    (Stage("prompts", 55),),
    (Stage("trace", 25),),
)
_SLICE_BYTES = 20 << 30  # what four layers of experts take, and a little


def main() -> None:
    arguments = _parse()
    if arguments.prepare:
        sys.exit(
            prepare.prepare(arguments.prepare, arguments.triton, arguments.arch, arguments.python, arguments.types)
        )
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    environment = _environment(arguments, out)
    results = Results(out / "results.jsonl", lambda line: print(report.line_of(line), flush=True))
    settings = Settings(
        out=out,
        scratch=_scratch(out, arguments.stand_in),
        is_stand_in=arguments.stand_in,
        types=tuple(name.upper() for name in arguments.types.split(",") if name),
        expert_layers=1 if arguments.stand_in else arguments.layers,
    )
    try:
        run_groups(_chosen(arguments), settings, arguments.minutes, _faults(arguments.fail), environment, results)
    finally:
        shutil.rmtree(settings.scratch, ignore_errors=True)
        results.close()
    print(*report.table(results.lines), sep="\n")
    print(report.as_json(results.lines))
    sys.exit(0 if all(line["ok"] for line in results.lines) else 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="all stages together end by then")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for results and logs")
    parser.add_argument("--carried", type=Path, help="folder that --prepare made: wheels and compiled kernels")
    parser.add_argument("--stages", default="", help="only these, comma-separated")
    parser.add_argument("--types", default="", help="types of experts for the kernels, comma-separated; default all")
    parser.add_argument("--layers", type=int, default=4, help="layers of experts of the slice: 3.6 GB each")
    parser.add_argument(
        "--stand-in", action="store_true", help="no GPU: tiny sizes on the CPU, tries the script itself"
    )
    parser.add_argument("--fail", action="append", default=[], metavar="STAGE=error|hang|crash", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="make what a bare machine needs, and stop")
    parser.add_argument(
        "--triton", default="", help="with --prepare: the machine's version of Triton; default this one"
    )
    parser.add_argument("--arch", default="90", help="with --prepare: compute capability, 90 for an H100 or H200")
    parser.add_argument("--python", default="3.12", help="with --prepare: the machine's Python, for wheels")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> list[list[Stage]]:
    wanted = set(filter(None, arguments.stages.split(",")))
    known = {stage.name for group in GROUPS for stage in group}
    if not wanted <= known:
        sys.exit(f"--stages {arguments.stages}: there are {', '.join(sorted(known))}")
    groups = [[stage for stage in group if not wanted or stage.name in wanted] for group in GROUPS]
    if arguments.stand_in:  # everything at once: nothing is timed
        groups = [[Stage(stage.name, stage.limit_s) for group in groups for stage in group if stage.name != "file"]]
    return [group for group in groups if group]


def _faults(given: list[str]) -> dict[str, str]:
    return dict(each.split("=", 1) for each in given)


def _scratch(out: Path, is_stand_in: bool) -> Path:
    """A folder for the slice: memory where that is large enough."""
    memory = Path("/dev/shm")
    has_memory = not is_stand_in and memory.exists() and shutil.disk_usage(memory).free > _SLICE_BYTES
    folder = (memory if has_memory else out) / f"gpu-check-{os.getpid()}"
    folder.mkdir()
    return folder


def _environment(arguments: argparse.Namespace, out: Path) -> dict[str, str]:
    """Of the stages: the checkout first, missing packages from carried wheels, a copy of the carried kernels."""
    environment = dict(os.environ)
    paths = [os.getcwd()]
    if arguments.carried:
        if missing := _missing(arguments.carried / "wheels"):
            paths.append(str(_install(missing, out / "site")))
        if (arguments.carried / "triton-cache").exists():
            shutil.copytree(arguments.carried / "triton-cache", out / "triton-cache", dirs_exist_ok=True)
            environment["TRITON_CACHE_DIR"] = str(out / "triton-cache")
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [environment.get("PYTHONPATH")])])
    return environment


def _missing(wheels: Path) -> list[Path]:
    """Those of packages that this Python has not, whatever version it has of the others."""
    missing = []
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.partition("-")[0].replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            missing.append(wheel)
    return missing


def _install(wheels: list[Path], folder: Path) -> Path:
    """Into a folder of its own: the machine's Python stays as it is."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder)]
    for wheel in wheels:  # one that is of another Python does not keep the others away
        subprocess.run([*command, str(wheel)], check=False)
    return folder


if __name__ == "__main__":
    main()
