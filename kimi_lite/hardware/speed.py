"""The machine's speeds: measured once by `doctor`, `bench` or `plan --measure`, then remembered in the cache folder.

A speed belongs to a machine: the file is keyed by CPU, cores and memory, a disk's by its device.
"""

import json
from datetime import date
from pathlib import Path

from kimi_lite.files import cache_folder, whole_file
from kimi_lite.hardware.probe import Hardware

_FILE_NAME = "speeds.json"
_KEPT_DAYS = 30
_LARGEST_FILES = ("*.gguf", "*.safetensors")


def measure(hardware: Hardware) -> Hardware:
    """Reads memory and, where a model lies at the disk's path, its largest file; remembers what it finds."""
    from kimi_lite.hardware.bandwidth import measure_disk, measure_ram

    found = {"ram": measure_ram(hardware.num_cores)}
    file = largest_file(hardware.disk.path) if hardware.disk else None
    disk_bytes_s = measure_disk(file) if file else None
    if disk_bytes_s:
        found["disk"] = disk_bytes_s
    return recall(measured(hardware, **found))


def measured(hardware: Hardware, **bytes_s: float) -> Hardware:
    """With speeds of `ram` or `disk` that were measured just now; they are remembered."""
    remember(hardware, **bytes_s)
    return hardware.with_speeds("measured", **bytes_s)


def recall(hardware: Hardware) -> Hardware:
    """With what was measured before, if anything was."""
    record = _read(_file())
    found = {"ram": record.get(_machine_key(hardware)), "disk": record.get(_disk_key(hardware))}
    known = {place: float(entry["bytes_s"]) for place, entry in found.items() if entry}
    return hardware.with_speeds("measured", **known) if known else hardware


def remember(hardware: Hardware, **bytes_s: float) -> None:
    """Keeps speeds of `ram` and `disk`, the fastest of a month: other programs only ever make a machine look slower. A
    cache folder that cannot be written only means measuring again."""
    keys = {"ram": _machine_key(hardware), "disk": _disk_key(hardware)}
    file, today = _file(), date.today()
    known = {key: entry for key, entry in _read(file).items() if _age_days(entry, today) <= _KEPT_DAYS}
    entries = {
        keys[place]: {"bytes_s": speed, "date": today.isoformat()}
        for place, speed in bytes_s.items()
        if speed >= known.get(keys[place], {}).get("bytes_s", 0)
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as stream:
            json.dump(known | entries, stream, indent=1)
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _age_days(entry: dict, today: date) -> float:
    try:
        return (today - date.fromisoformat(entry["date"])).days
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _machine_key(hardware: Hardware) -> str:
    return f"ram of {hardware.cpu_name}, {hardware.num_cores} cores"


def _disk_key(hardware: Hardware) -> str:
    """By device number: a model folder may move, its disk stays."""
    if not hardware.disk:
        return "no disk"
    path = hardware.disk.path
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return f"disk {existing.stat().st_dev}"
