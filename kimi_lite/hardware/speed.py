"""The machine's speeds: measured by `doctor`, `bench` and `plan --measure`, looked at for 0.2 s by everything else that
plans, and remembered in the cache folder.

A speed belongs to a machine: the file is keyed by CPU, cores and instructions, a disk's by its device.
"""

import json
from datetime import date
from functools import cache
from pathlib import Path

from kimi_lite.files import cache_folder, whole_file
from kimi_lite.hardware.machine import Hardware

_FILE_NAME = "speeds.json"
_KEPT_DAYS = 30
_GLANCE_S, _GLANCE_BYTES = 0.1, 256 << 20  # each for memory and arithmetic; to read
_LARGEST_FILES = ("*.gguf", "*.safetensors")


def measure(hardware: Hardware, seconds: float = 1.0) -> Hardware:
    """Reads memory, multiplies, and reads the largest file of a model at the disk's path; remembers what it finds."""
    from kimi_lite.hardware.bandwidth import measure_disk, measure_macs, measure_ram

    found = {
        "ram": measure_ram(hardware.num_cores, seconds),
        "cpu": measure_macs(hardware.num_cores, min(0.25, seconds)),
    }
    file = largest_file(hardware.disk.path) if hardware.disk else None
    disk_bytes_s = measure_disk(file, seconds) if file else None
    if disk_bytes_s:
        found["disk"] = disk_bytes_s
    return recall(measured(hardware, **found))


def glance(hardware: Hardware) -> Hardware:
    """With what was measured before. Where memory and arithmetic were not measured today they are now, for 0.2 s: the
    fastest of a month is kept, so a busy moment is soon forgotten."""
    entries, today = _read(_file()), date.today()
    entry = entries.get(_machine_key(hardware), {})
    if _cpu_key(hardware) in entries and _age_days(entry.get("last", entry.get("date")), today) <= 0:
        return recall(hardware)
    found = dict(zip(("ram", "cpu"), _look(hardware.num_cores), strict=True))
    return recall(measured(hardware, **found))


@cache
def _look(num_cores: int) -> tuple[float, float]:
    """Bytes/s and int8 MACs/s; once a process, where the cache folder cannot be written."""
    from kimi_lite.hardware.bandwidth import measure_macs, measure_ram

    return measure_ram(num_cores, _GLANCE_S, _GLANCE_BYTES), measure_macs(num_cores, _GLANCE_S)


def measured(hardware: Hardware, **per_s: float) -> Hardware:
    """With speeds of `ram`, `cpu` or `disk` that were measured just now; they are remembered."""
    remember(hardware, **per_s)
    return hardware.with_speeds("measured", **per_s)


def recall(hardware: Hardware) -> Hardware:
    """With what was measured before, if anything was."""
    record = _read(_file())
    known = {place: float(record[key]["bytes_s"]) for place, key in _keys(hardware).items() if key in record}
    return hardware.with_speeds("measured", **known) if known else hardware


def remember(hardware: Hardware, **per_s: float) -> None:
    """Keeps speeds of `ram`, `cpu` and `disk`, the fastest of a month: other programs only ever make a machine look
    slower. A cache folder that cannot be written only means measuring again."""
    keys, file, today = _keys(hardware), _file(), date.today()
    known = {key: entry for key, entry in _read(file).items() if _age_days(entry.get("date"), today) <= _KEPT_DAYS}
    for place, speed in per_s.items():
        before = known.get(keys[place], {})
        if speed >= before.get("bytes_s", 0):
            before = {"bytes_s": speed, "date": today.isoformat()}
        known[keys[place]] = before | {"last": today.isoformat()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as stream:
            json.dump(known, stream, indent=1)
    except OSError:
        return


def largest_file(path: Path) -> Path | None:
    """The largest weight file at or below `path`."""
    if path.is_file():
        return path
    files = [file for pattern in _LARGEST_FILES for file in path.glob(pattern)] if path.is_dir() else []
    return max(files, key=lambda file: file.stat().st_size, default=None)


def _file() -> Path:
    return cache_folder() / _FILE_NAME


def _read(file: Path) -> dict:
    """What is remembered; a damaged file is nothing."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {key: entry for key, entry in record.items() if float(entry["bytes_s"]) > 0}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _age_days(day: object, today: date) -> float:
    try:
        return (today - date.fromisoformat(day)).days
    except (ValueError, TypeError):
        return float("inf")


def _keys(hardware: Hardware) -> dict[str, str]:
    return {"ram": _machine_key(hardware), "cpu": _cpu_key(hardware), "disk": _disk_key(hardware)}


def _cpu_key(hardware: Hardware) -> str:
    return f"{hardware.isa} of {hardware.cpu_name}, {hardware.num_cores} cores"


def _machine_key(hardware: Hardware) -> str:
    nodes = f", {len(hardware.nodes)} nodes, {hardware.memory_policy}" if hardware.has_nodes else ""
    return f"ram of {hardware.cpu_name}, {hardware.num_cores} cores{nodes}"


def _disk_key(hardware: Hardware) -> str:
    """By device number: a model folder may move, its disk stays."""
    if not hardware.disk:
        return "no disk"
    path = hardware.disk.path
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return f"disk {existing.stat().st_dev}"
