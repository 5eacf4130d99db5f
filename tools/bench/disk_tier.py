"""The disk tier against plain memory mapping under the same memory limit, and against what the disk itself can give.

    python -m tools.make.slice slice.gguf --layers 1+2 --num-experts 256
    python -m tools.bench.disk_tier -m slice.gguf --share 0.25

Both paths decode the same tokens in a process of their own inside one memory cgroup, which also holds the page cache
that mapped files use: `ulimit` cannot limit that. The limit is what everything but the routed experts takes, and
`--share` of the experts. The bound is the disk's own speed over the bytes of the experts that were asked for and not in
the cache (a right guess does not make them fewer). That speed is the better of two: the same readers on random experts
of the file with nothing else to do, and what the disk gave during the run while a read was under way, for shared disks
change their mind. Needs Linux and the right to make a cgroup (root, mostly); without it the tier alone is measured,
unlimited.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.arch.tensors import open_model
from kimi_lite.engine.loader import load
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.memory import aligned_memory
from kimi_lite.experts.reader import ExpertReader
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.options import Options
from kimi_lite.plan.workspace import cpu_work_bytes, program_bytes
from kimi_lite.tools.bench.environment import drop_page_cache

_CGROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))  # version 1, version 2
_SLACK_BYTES = 192 << 20  # of the limit: page tables, kernel buffers, compiling
_WARM_TOKENS = 12


def measure_disk(index: ExpertIndex, num_readers: int, is_direct: bool, seconds: float = 3.0) -> float:
    """Bytes/s of the readers on random experts of the file, nothing else running."""
    rng, reader = np.random.default_rng(0), ExpertReader(index.shards, num_readers, is_direct)
    layers, memory = list(index.layers), aligned_memory(16 * max(index.ram_pools))
    try:
        start_s, count = time.perf_counter(), 0
        under_way = 0
        while time.perf_counter() - start_s < seconds or under_way:
            while under_way < 16 and time.perf_counter() - start_s < seconds:
                layer, slot_bytes = layers[rng.integers(len(layers))], max(index.ram_pools)
                slot = memory[count % 16 * slot_bytes : (count % 16 + 1) * slot_bytes]
                reader.submit(index.layers[layer].reads(int(rng.integers(index.num_experts)), slot), True)
                under_way, count = under_way + 1, count + 1
            for job in reader.finished(is_waiting=True):
                under_way -= 1
                if job.error:
                    raise KimiLiteError(f"{index.shards[0]}: {job.error}.", "Check the disk.")
        return reader.stats.num_bytes / (time.perf_counter() - start_s)
    finally:
        reader.close()


def decode(model: Path, num_tokens: int, options: Options) -> dict:
    """Decodes the same tokens: tokens/s after a few to warm up, and what the disk did."""
    num_positions = num_tokens + _WARM_TOKENS
    engine = load(model, replace(options, context_length=num_positions, device="cpu", keeps_heat=False))
    transformer = engine.model
    ids = np.random.default_rng(1).integers(0, engine.plan.sizes.config.vocab_size, num_positions).astype(np.int32)
    whole = (SequenceSlice(0, 1, np.arange(engine.kv.num_pages, dtype=np.int32), is_generated=True),)
    try:
        for position, token in enumerate(ids):
            if position == _WARM_TOKENS:
                before, disk_bytes, start_s = transformer.counters(), _read_bytes(), time.perf_counter()
            batch = Batch(np.array([token]), np.array([position], np.int32), np.ones(1, bool), whole)
            logits = transformer.forward(batch)
        seconds = time.perf_counter() - start_s
        counters = {name: value - before[name] for name, value in transformer.counters().items()}
    finally:
        engine.close()
    return {
        "tok_s": num_tokens / seconds,
        "disk_bytes_per_token": (_read_bytes() - disk_bytes) / num_tokens,
        "checksum": float(np.abs(logits).sum()),
        **{name: value / num_tokens for name, value in counters.items()},
    }


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path | None]:
    """A cgroup of that size, or None where none may be made."""
    for base in _CGROUPS:
        folder = base / f"kimi-lite-{os.getpid()}"
        limit = folder / ("memory.limit_in_bytes" if base.name == "memory" else "memory.max")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            limit.write_text(str(limit_bytes))
        except OSError:
            folder.rmdir()
            continue
        try:
            yield folder
        finally:
            folder.rmdir()
        return
    yield None


def _child(arguments: list[str], group: Path | None) -> dict:
    """Runs this module again inside the cgroup; its last line is JSON. Raises KimiLiteError."""
    join = "" if group is None else f"echo $$ > {group / 'cgroup.procs'} && "
    command = [sys.executable, "-m", "tools.bench.disk_tier", *arguments]
    run = subprocess.run(["sh", "-c", f'{join}exec "$@"', "sh", *command], capture_output=True, text=True, check=False)
    if run.returncode:
        raise KimiLiteError(
            f"The child ended with {run.returncode}: {run.stderr.strip()[-400:]}", "Try a larger --share."
        )
    return json.loads(run.stdout.splitlines()[-1])


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="GGUF file or first shard.")],
    share: Annotated[float, typer.Option(help="Of the routed experts that the memory holds.", min=0.01, max=1)] = 0.25,
    tokens: Annotated[int, typer.Option("-n", help="Tokens to decode.", min=1)] = 64,
    threads: Annotated[int | None, typer.Option("-t", min=1)] = None,
    readers: Annotated[int, typer.Option(help="Threads that read.", min=1)] = 8,
    buffered: Annotated[bool, typer.Option("--buffered", help="Through the page cache instead of O_DIRECT.")] = False,
    path: Annotated[Literal["both", "tier", "map"], typer.Option(help="Inside: one path, no limit.")] = "both",
) -> None:
    """Measure the disk tier."""
    try:
        store, config = open_model(model)
        index = ExpertIndex.find(store, config)
        mapped = Options(num_threads=threads, maps_beyond_ram=True)
        tier = Options(
            num_threads=threads,
            ram_expert_bytes=int(share * index.routed_bytes),
            num_readers=readers,
            is_reading_direct=not buffered,
        )
        if path != "both":
            print(json.dumps(decode(model, tokens, tier if path == "tier" else mapped)))
            return
        _compare(store, config, index, tier, [*sys.argv[1:]])
    except KimiLiteError as error:
        print(f"disk_tier: {error}", file=sys.stderr)
        sys.exit(2)


def _compare(store: GGUFStore, config: ModelConfig, index: ExpertIndex, tier: Options, arguments: list[str]) -> None:
    sizes = store_sizes(store, config)
    others_bytes = (
        store.total_bytes - index.routed_bytes + cpu_work_bytes(config, os.cpu_count() or 1) + program_bytes(sizes)
    )
    limit_bytes = others_bytes + tier.ram_expert_bytes + _SLACK_BYTES
    drop_page_cache(store.shards)
    disk_b_s = measure_disk(index, tier.num_readers, tier.is_reading_direct)
    print(f"routed experts {index.routed_bytes / 1e9:.2f} GB, in RAM {tier.ram_expert_bytes / 1e9:.2f} GB; "
          f"everything else "
          f"{others_bytes / 1e9:.2f} GB; limit {limit_bytes / 1e9:.2f} GB")  # fmt: skip
    print(
        f"disk {disk_b_s / 1e9:.2f} GB/s: {tier.num_readers} readers, random experts, "
        f"{'direct' if tier.is_reading_direct else 'cached'}"
    )
    found = {}
    with memory_cgroup(limit_bytes) as group:
        for path in ("tier", "map") if group else ("tier",):
            drop_page_cache(store.shards)
            found[path] = _child([*arguments, "--path", path], group)
            _show(path, found[path])
    ours, expert_bytes = found["tier"], index.routed_bytes / (index.num_experts * len(index.layers))
    missed_bytes = (ours["expert_misses"] + ours["expert_right_guesses"]) * expert_bytes
    run_b_s = ours["disk_bytes"] / ours["disk_busy_s"] if ours["disk_busy_s"] else 0.0
    bound = max(disk_b_s, run_b_s) / missed_bytes if missed_bytes else float("inf")
    print(f"disk {run_b_s / 1e9:.2f} GB/s during the run, while it was read")
    print(
        f"bound {bound:.2f} tok/s: {missed_bytes / 1e6:.1f} MB missed a token; the tier reaches "
        f"{ours['tok_s'] / bound:.0%}"
    )
    if group is None:
        print("no cgroup may be made here, so memory mapping under a limit was not measured")
    document = {
        "disk_b_s": disk_b_s,
        "run_disk_b_s": run_b_s,
        "limit_bytes": limit_bytes,
        "share_of_bound": ours["tok_s"] / bound,
        "paths": found,
    }
    print(json.dumps({"tool": "disk_tier", "schema": 1, **document}))


def _show(path: str, run: dict) -> None:
    line = f"{path:<5} {run['tok_s']:.2f} tok/s, {run['disk_bytes_per_token'] / 1e6:.1f} MB a token from disk"
    if "expert_hits" in run:
        asked = run["expert_hits"] + run["expert_late"] + run["expert_misses"]
        guesses = f"{run['expert_right_guesses']:.1f} of {run['expert_guesses']:.1f} guesses right"
        waited = f"waited {1000 * run['expert_wait_s']:.0f} ms"
        line += f", {run['expert_hits'] / asked:.1%} of {asked:.0f} experts there, {guesses}, {waited}"
    print(line, flush=True)


if __name__ == "__main__":
    app()
