"""The probe: control groups, GPUs by NVML, described machines, remembered speeds. Systems stand in as folders and
modules."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from kimi_lite.hardware import bandwidth, host
from kimi_lite.hardware import gpu as hardware_gpu
from kimi_lite.hardware import speed as hardware_speed
from kimi_lite.hardware.bandwidth import measure_disk, measure_macs, measure_ram
from kimi_lite.hardware.machine import Hardware, described, free_of
from kimi_lite.hardware.nodes import described_nodes
from kimi_lite.hardware.probe import probe
from kimi_lite.native.amx import has_amx
from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.units import GIB, MIB


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))
    found = probe(tmp_path / "not" / "there.gguf")
    assert 0 < found.ram_free_bytes <= found.ram_total_bytes <= psutil.virtual_memory().total
    assert found.num_cores >= 1 and found.cpu_name and found.isa
    assert found.disk.path == tmp_path / "not" / "there.gguf" and found.disk.free_bytes > 0
    assert not found.is_described and found.cores.num_usable == found.num_cores
    assert 1e9 < found.ram_bytes_s < 2000e9 and 1e9 < found.cpu_macs_s < 1e14
    assert found.origins["ram"] == found.origins["cpu"] == "measured", "looked at for 0.2 s, not assumed"


@pytest.mark.parametrize(
    ("place", "release", "is_slow"),
    [
        ("/mnt/c/models/k.gguf", "5.15.90.1-microsoft-standard-WSL2", True),
        ("/mnt/d", "5.15.90.1-microsoft-standard-WSL2", True),
        ("/mnt/data/k.gguf", "5.15.90.1-microsoft-standard-WSL2", False),
        ("/home/me/mnt/c/k.gguf", "5.15.90.1-microsoft-standard-WSL2", False),
        ("/mnt/c/models/k.gguf", "6.8.0-45-generic", False),
    ],
)
def test_drives_of_windows(place, release, is_slow, monkeypatch):
    monkeypatch.setattr(host.platform, "uname", lambda: SimpleNamespace(release=release))
    assert host.is_on_windows_drive(Path(place)) is is_slow


def test_probing_imports_no_torch():
    import subprocess

    code = "import sys; from kimi_lite.hardware.probe import probe; probe(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        (
            "0::/user/app",
            {"user/memory.max": "2147483648", "user/app/memory.max": "max", "user/memory.current": "1073741824"},
            2048,
        ),
        ("0::/", {"memory.max": "1073741824", "memory.current": "5", "memory.stat": "inactive_file 3"}, 1024),
        (
            "9:memory:/box",
            {"memory/box/memory.limit_in_bytes": "536870912", "memory/box/memory.usage_in_bytes": "1"},
            512,
        ),
        ("9:memory:/box", {"memory/box/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("9:cpu:/box", {}, None),
    ],
)
def test_limits_of_control_groups(tmp_path, group, files, expected):
    write(tmp_path / "proc/self/cgroup", f"{group}\n")
    for name, text in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, f"{text}\n")
    limit = host.cgroup_limit(tmp_path)
    assert (limit.limit_bytes // MIB if limit else None) == expected


def test_memory_keeps_to_the_group(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/memory.max", str(GIB))
    write(tmp_path / "sys/fs/cgroup/memory.current", str(GIB // 2))
    write(tmp_path / "sys/fs/cgroup/memory.stat", f"anon 7\ninactive_file {GIB // 4}\n")
    assert host.memory(tmp_path) == (GIB, GIB - GIB // 4)
    write(tmp_path / "sys/fs/cgroup/memory.max", str(1 << 50))  # more than the machine has: no limit
    assert host.memory(tmp_path)[0] == psutil.virtual_memory().total


class FakeNvml(SimpleNamespace):
    """Answers as nvidia-ml-py does for one RTX 4090; `refuses` are questions that this GPU does not answer."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_MEM, NVML_CLOCK_SM = 2, 1

    def __init__(self, refuses=(), has_driver=True, num_gpus=1):
        answers = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetCount": num_gpus,
            "nvmlDeviceGetHandleByIndex": "gpu",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 * GIB, free=23 * GIB),
            "nvmlDeviceGetName": b"NVIDIA GeForce RTX 4090",
            "nvmlDeviceGetMemoryBusWidth": 384,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetMaxPcieLinkGeneration": 4,
            "nvmlDeviceGetCudaComputeCapability": (8, 9),
            "nvmlDeviceGetNumGpuCores": 16384,
            "nvmlDeviceGetDisplayActive": 1,
            "nvmlSystemGetDriverVersion": "550.54",
            "nvmlSystemGetCudaDriverVersion": 12040,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=1, usedGpuMemory=GIB)],
            "nvmlDeviceGetGraphicsRunningProcesses": [SimpleNamespace(pid=1, usedGpuMemory=GIB)],
        }
        functions = {name: self._function(name, answer, refuses) for name, answer in answers.items()}
        clocks = {self.NVML_CLOCK_MEM: 10501, self.NVML_CLOCK_SM: 2520}
        functions["nvmlDeviceGetMaxClockInfo"] = lambda handle, kind: clocks[kind]
        if not has_driver:
            functions["nvmlInit"] = self._function("nvmlInit", None, ("nvmlInit",))
        super().__init__(**functions)

    def _function(self, name, answer, refuses):
        def ask(*_):
            if name in refuses:
                raise self.NVMLError(f"{name}: Not Supported")
            return answer

        return ask


def test_a_gpu_by_its_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    gpu = hardware_gpu.probe_gpu()
    assert (gpu.name, gpu.driver, gpu.compute_capability, gpu.cuda_version) == ("RTX 4090", "550.54", "8.9", "12.4")
    assert gpu.vram_bytes_s == pytest.approx(1008e9, rel=0.001)
    assert gpu.pcie_bytes_s == pytest.approx(23e9)
    assert gpu.flops_s == pytest.approx(165e12, rel=0.01)
    assert gpu.has_display
    assert len(gpu.processes) == 1 and gpu.processes[0].vram_bytes == GIB
    assert not hardware_gpu.unavailable_reason()


class FakeLibcuda:
    """The driver of a process that may see one of the machine's two GPUs."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device, ordinal):
        return 0 if ordinal == 0 else 101

    def cuDeviceGetPCIBusId(self, text, size, device):
        text.value = b"00000000:65:00.0"
        return 0


def test_the_gpu_that_cuda_uses_and_not_the_largest(monkeypatch):
    """CUDA_VISIBLE_DEVICES hides the larger one; a number that CUDA does not know is not guessed by its place."""
    monkeypatch.setattr(hardware_gpu.ctypes, "CDLL", lambda name: FakeLibcuda())
    assert hardware_gpu.count_gpus() == 1
    nvml = FakeNvml(num_gpus=2)
    asked = []
    nvml.nvmlDeviceGetHandleByPciBusId = lambda bus_id: asked.append(bus_id) or "the small one"
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(
        total=(16 if handle == "the small one" else 80) * GIB, free=GIB
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert hardware_gpu.probe_gpu(0).vram_total_bytes == 16 * GIB and asked == [b"00000000:65:00.0"]
    monkeypatch.setattr(hardware_gpu.ctypes, "CDLL", raise_os_error)
    assert hardware_gpu.count_gpus() == 0 and hardware_gpu.probe_gpu(0).vram_total_bytes == 80 * GIB


def raise_os_error(name):
    raise OSError(f"{name}: not found")


def test_a_gpu_that_tells_little(monkeypatch):
    silent = ("nvmlDeviceGetMemoryBusWidth", "nvmlDeviceGetMaxPcieLinkWidth", "nvmlDeviceGetNumGpuCores")
    processes = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(refuses=(*silent, *processes)))
    gpu = hardware_gpu.probe_gpu()
    assert (gpu.vram_bytes_s, gpu.pcie_bytes_s, gpu.flops_s, gpu.processes) == (None, None, None, ())
    assert gpu.vram_total_bytes == 24 * GIB


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "nvidia-ml-py is not installed"),
        (FakeNvml(has_driver=False), "no NVIDIA driver"),
        (FakeNvml(num_gpus=0), "sees no GPU"),
        (FakeNvml(refuses=("nvmlDeviceGetCount",)), "driver answers"),
    ],
)
def test_no_gpu_says_why(monkeypatch, module, reason):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert hardware_gpu.probe_gpu() is None
    assert reason in hardware_gpu.unavailable_reason()


def test_described_machines():
    here = Hardware("here", 2, "avx2", 32 * GIB, 30 * GIB, ram_bytes_s=30e9, clock_hz=3e9)
    assert described(here, None, None) is here
    assert described(here, 16 * GIB, None) is here  # a limit, not another machine
    other = described(here, 256 * GIB, 24 * GIB)
    assert other.is_described and other.ram_total_bytes == 256 * GIB and other.ram_bytes_s is None
    assert other.ram_free_bytes == free_of(256 * GIB) < 256 * GIB
    assert other.gpu.vram_total_bytes == 24 * GIB > other.gpu.vram_free_bytes
    assert other.has_assumed_cpu and (other.num_cores, other.cpu_name) == (16, "16-core desktop (assumed)")
    with_gpu = described(here, None, 24 * GIB)
    assert with_gpu.has_assumed_cpu and with_gpu.ram_bytes_s is None and with_gpu.ram_total_bytes == 32 * GIB
    larger = described(here, 64 * GIB, None)
    assert larger.is_described and not larger.has_assumed_cpu
    assert (larger.num_cores, larger.ram_bytes_s, larger.ram_free_bytes) == (2, 30e9, 62 * GIB)
    assert described(here, None, None, 6).num_cores == 6
    assert described(with_gpu, None, 0).gpu is None


def test_speeds_are_remembered_for_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))
    found = probe(tmp_path)
    hardware_speed.remember(found, ram=1400e9, disk=2e9)
    again = probe(tmp_path)
    assert (again.ram_bytes_s, again.disk.read_bytes_s) == (1400e9, 2e9)
    assert again.origins["ram"] == again.origins["disk"] == "measured"
    unknown = replace(found, ram_bytes_s=None)
    assert hardware_speed.recall(unknown).ram_bytes_s == 1400e9
    assert hardware_speed.recall(replace(unknown, cpu_name="another")).ram_bytes_s is None
    for damage in ("", "[]", '{"a": 1}', '{"ram of x": {"bytes_s": "fast"}}'):
        (tmp_path / "speeds.json").write_text(damage)
        assert probe(tmp_path).ram_bytes_s == found.ram_bytes_s, "looked at again"
    hardware_speed.remember(found, ram=1500e9)
    hardware_speed.remember(found, ram=1e9)
    assert probe(tmp_path).ram_bytes_s == 1500e9, "the fastest of a month"
    assert json.loads((tmp_path / "speeds.json").read_text())


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path / "file"))
    hardware_speed.remember(probe(tmp_path), ram=1400e9)
    assert probe(tmp_path).ram_bytes_s < 1000e9, "nothing is remembered"


def test_a_glance_is_taken_once_a_day(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))
    looks = []
    monkeypatch.setattr(hardware_speed, "_look", lambda num_cores: looks.append(num_cores) or (20e9 + len(looks), 5e11))
    assert [probe(tmp_path).ram_bytes_s for _ in range(3)] == [20e9 + 1] * 3 and len(looks) == 1
    record = json.loads((tmp_path / "speeds.json").read_text())
    for entry in record.values():
        entry |= {"last": "2020-01-01"}
    (tmp_path / "speeds.json").write_text(json.dumps(record))
    assert probe(tmp_path).ram_bytes_s == 20e9 + 2 and len(looks) == 2


def test_measuring(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))
    assert 0.5e9 < measure_ram(1, seconds=0.05, buffer_bytes=16 << 20) < 2000e9
    assert 1e9 < measure_macs(1, seconds=0.02, with_tiles=False) < 2e12
    assert 1e9 < measure_macs(1, seconds=0.02) < (2e13 if has_amx() else 2e12)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"\1" * (32 << 20))
    speed = measure_disk(model, seconds=0.05)
    assert speed is None or 1e6 < speed < 1e12
    (tmp_path / "small.gguf").write_bytes(b"\1")
    assert measure_disk(tmp_path / "small.gguf") is None
    assert hardware_speed.largest_file(tmp_path) == model == hardware_speed.largest_file(model)
    assert hardware_speed.largest_file(tmp_path / "nothing") is None


def test_memory_on_several_nodes_is_measured_there(monkeypatch):
    """Each thread's share of what is read is touched by threads of its node; the nodes are pretended."""
    cpus = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
    groups = (ThreadGroup(0, 0, cpus, 0, 1), ThreadGroup(1, 1, cpus, 1, 3))
    spans, touch = [], bandwidth.touch
    monkeypatch.setattr(bandwidth, "place_threads", lambda num_threads: groups)
    monkeypatch.setattr(bandwidth, "touch", lambda each, own: spans.append(each) or touch(each, own))
    assert bandwidth.measure_ram(3, seconds=0.01, buffer_bytes=64 << 20) > 1e8
    (each,) = spans
    sizes = np.diff([*each.starts.tolist(), each.stop])
    assert each.owners.tolist() == [0, 1] * (len(sizes) // 2) and sizes[1] == 2 * sizes[0]


def test_speeds_belong_to_the_nodes(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))
    one = Hardware("a CPU", 16, "avx2", 64 * GIB, 60 * GIB)
    two = replace(one, nodes=described_nodes(2, 16, 64 * GIB, 60 * GIB))
    hardware_speed.remember(two, ram=400e9)
    assert hardware_speed.recall(two).ram_bytes_s == 400e9 and hardware_speed.recall(one).ram_bytes_s is None
    assert hardware_speed.recall(replace(two, memory_policy="interleaved")).ram_bytes_s is None
