"""`kimi-lite doctor`: every check on a healthy and on a sick machine; the report, JSON, exit codes, warming."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.apps.doctor import gpu as doctor_gpu
from kimi_lite.apps.doctor import model as doctor_model
from kimi_lite.apps.doctor import system as checks
from kimi_lite.apps.doctor.system import Facts
from kimi_lite.cli import app
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.host import CgroupLimit, Cores
from kimi_lite.hardware.machine import Disk, Gpu, GpuProcess, Hardware
from kimi_lite.hardware.nodes import described_nodes
from kimi_lite.native.cpu.nodes import Node
from kimi_lite.native.gpu.support import Unusable, compiler_remedy
from kimi_lite.native.isa import isa
from kimi_lite.units import GIB
from tests.tiny import write_tiny_gguf

ALL_PACKAGES = dict.fromkeys((*checks._PACKAGES, *checks._GPU_PACKAGES), "1.0") | {"triton": "3.9.0"}
GPU = Gpu("RTX 4090", 24 * GIB, 23 * GIB, 1008e9, 23e9, "550.54", 165e12, "8.9", "12.4")
HEALTHY = Facts(
    hardware=Hardware(
        "a CPU",
        16,
        "avx512-vnni",
        256 * GIB,
        240 * GIB,
        80e9,
        GPU,
        Disk(Path("/m"), 900 * GIB, 6e9),
        origins={"ram": "measured"},
    ),
    gpu_reason="",
    has_nvidia_device=True,
    cgroup=None,
    machine_ram_bytes=256 * GIB,
    swap_used_bytes=0,
    swap_total_bytes=8 * GIB,
    huge_pages="madvise",
    lockable_bytes=None,
    balances_nodes=False,
    is_wsl=False,
    cores=Cores(16, 32, 16),
    load_average=0.3,
    isa=("avx512-vnni", "vpdpbusd zmm", "znver4"),
    cpu_features=("avx2", "avx512vnni"),
    packages=ALL_PACKAGES,
    python=(3, 12, 1),
)

UNEVEN_NODES = (
    Node(0, frozenset(range(8)), 64 * GIB, 2 * GIB, ((0, 10), (1, 21))),
    Node(1, frozenset(range(8, 16)), 64 * GIB, 60 * GIB, ((0, 21), (1, 10))),
)


def with_hardware(**changes):
    return replace(HEALTHY, hardware=replace(HEALTHY.hardware, **changes))


def without_packages(*names):
    return replace(HEALTHY, packages=ALL_PACKAGES | dict.fromkeys(names))


def test_a_healthy_machine_is_ok():
    found = [check(HEALTHY) for check in checks.SYSTEM_CHECKS]
    assert {check.status for check in found} == {"ok"}, found
    assert len({check.name for check in found}) == len(found)
    assert "80.0 GB/s (measured)" in checks.check_memory(HEALTHY).finding


def without_compiler(facts):
    """Triton's check on a system of the Debian family that has neither gcc nor Python's headers."""
    missing = Unusable("no gcc", compiler_remedy('ID=linuxmint\nID_LIKE="ubuntu debian"'))
    with patch.object(doctor_gpu, "compiler_problem", lambda: missing):
        return doctor_gpu.check_triton(facts)


SICK = [
    (checks.check_python, replace(HEALTHY, python=(3, 9, 0)), "fail", "Python 3.11"),
    (checks.check_packages, without_packages("numba", "rich"), "fail", "pip install numba rich"),
    (checks.check_cores, replace(HEALTHY, cores=Cores(2, 4, 16, ("the CPU quota is 2",))), "warn", "--cpus"),
    (checks.check_load, replace(HEALTHY, load_average=8.5), "warn", "top"),
    (checks.check_load, replace(HEALTHY, load_average=None), "ok", ""),
    (checks.check_memory, with_hardware(ram_bytes_s=12e9), "warn", "channel"),
    (checks.check_memory, with_hardware(ram_bytes_s=None), "ok", ""),
    (checks.check_nodes, with_hardware(nodes=described_nodes(2, 32, 256 * GIB, 240 * GIB)), "ok", ""),
    (checks.check_nodes, with_hardware(nodes=UNEVEN_NODES), "warn", "numastat"),
    (
        checks.check_nodes,
        replace(with_hardware(nodes=described_nodes(2, 32, 256 * GIB, 240 * GIB)), balances_nodes=True),
        "warn",
        "numa_balancing",
    ),
    (checks.check_nodes, replace(HEALTHY, balances_nodes=True), "ok", ""),
    (checks.check_cgroup, replace(HEALTHY, cgroup=CgroupLimit(32 * GIB, 0, Path("/sys/x"))), "warn", "container"),
    (checks.check_cgroup, replace(HEALTHY, cgroup=CgroupLimit(512 * GIB, 0, Path("/sys/x"))), "ok", ""),
    (checks.check_swap, replace(HEALTHY, swap_used_bytes=2 * GIB), "warn", "swapoff"),
    (checks.check_huge_pages, replace(HEALTHY, huge_pages="never"), "warn", "echo madvise"),
    (checks.check_huge_pages, replace(HEALTHY, huge_pages=None), "ok", ""),
    (checks.check_lock, replace(HEALTHY, lockable_bytes=8 << 20), "ok", ""),
    (checks.check_wsl, replace(HEALTHY, is_wsl=True), "warn", ".wslconfig"),
    (checks.check_disk, with_hardware(disk=Disk(Path("/m"), GIB, 0.2e9)), "warn", "17 minutes"),
    (checks.check_disk, with_hardware(disk=None), "ok", ""),
    (doctor_gpu._no_gpu, replace(HEALTHY, gpu_reason="no NVIDIA driver"), "fail", "install its driver"),
    (doctor_gpu._no_gpu, replace(HEALTHY, has_nvidia_device=False), "warn", "on the CPU"),
    (doctor_gpu._no_gpu, without_packages("nvidia-ml-py"), "warn", "pip install nvidia-ml-py"),
    (doctor_gpu.check_triton, without_packages("triton"), "fail", "pip install triton"),
    (doctor_gpu.check_triton, HEALTHY, "ok", ""),
    (without_compiler, replace(HEALTHY, packages=ALL_PACKAGES | {"triton": "9.9.0"}), "fail", "sudo apt install gcc"),
    (without_compiler, replace(HEALTHY, packages=ALL_PACKAGES | {"triton": "3.5.1"}), "ok", ""),
]


@pytest.mark.parametrize(("check", "facts", "status", "fix"), SICK)
def test_a_sick_machine_is_told_what_to_do(check, facts, status, fix):
    found = check(facts)
    assert found.status == status and fix in found.fix and "\n" not in found.fix
    assert bool(found.fix) == (status != "ok")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the machine type of Linux")
def test_hidden_vector_instructions_are_seen(monkeypatch):
    monkeypatch.setattr(checks.platform, "machine", lambda: "x86_64")
    assert checks.check_isa(replace(HEALTHY, isa=("portable", "generic vector code", "x86-64"))).status == "warn"
    monkeypatch.setattr(checks.platform, "machine", lambda: "aarch64")
    assert checks.check_isa(replace(HEALTHY, isa=("portable", "generic vector code", "apple-m1"))).status == "ok"


@pytest.mark.parametrize(
    ("changes", "status"), [({}, "ok"), ({"compute_capability": "7.5"}, "fail"), ({"compute_capability": ""}, "ok")]
)
def test_generations_of_gpus(changes, status):
    assert doctor_gpu.check_gpu(replace(GPU, **changes)).status == status


def test_windows_is_told_of_wsl(monkeypatch):
    monkeypatch.setattr(doctor_gpu.platform, "system", lambda: "Windows")
    assert "WSL2" in doctor_gpu._no_gpu(HEALTHY).fix


def test_who_holds_the_gpu_is_named():
    busy = replace(GPU, vram_free_bytes=10 * GIB, processes=(GpuProcess(42, "game", 13 * GIB),))
    assert "game (pid 42) 13.0 GiB" in doctor_gpu.check_free_memory(busy).fix
    assert "nvidia-smi" in doctor_gpu.check_free_memory(replace(busy, processes=())).fix
    assert doctor_gpu.check_free_memory(GPU).status == "ok"


def test_torch_for_the_gpu(monkeypatch):
    def fake_torch(is_available):
        cuda = SimpleNamespace(is_available=lambda: is_available, device_count=lambda: int(is_available))
        return SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=cuda)

    monkeypatch.setitem(sys.modules, "torch", fake_torch(True))
    monkeypatch.setattr(doctor_gpu, "why_unusable", lambda: None)
    assert [check.status for check in doctor_gpu.gpu_checks(HEALTHY)] == ["ok"] * 5
    monkeypatch.setattr(doctor_gpu, "why_unusable", lambda: Unusable("No kernel runs.", "Do this."))
    assert [check.fix for check in doctor_gpu.gpu_checks(HEALTHY) if check.status == "fail"] == ["Do this."]
    monkeypatch.setitem(sys.modules, "torch", fake_torch(False))
    check = doctor_gpu.check_torch(HEALTHY, GPU)
    assert check.status == "fail" and "serves CUDA 12.4" in check.finding and "driver 580 or newer" in check.fix
    newer = doctor_gpu.check_torch(HEALTHY, replace(GPU, cuda_version="13.1"))
    assert newer.status == "fail" and "CUDA_VISIBLE_DEVICES" in newer.fix
    assert len(list(doctor_gpu.gpu_checks(HEALTHY))) == 4, "no kernel is tried where torch sees no GPU"
    assert doctor_gpu.check_torch(without_packages("torch"), GPU).status == "fail"
    plain = replace(HEALTHY, packages=ALL_PACKAGES | {"torch": "2.13.0+cpu"})
    assert "without CUDA" in doctor_gpu.check_torch(plain, GPU).finding


def test_a_cache_that_cannot_be_written_fails(monkeypatch, tmp_path):
    monkeypatch.setattr("kimi_lite.native.cpu.prebuilt.num_kernels", lambda: 0)  # a checkout that made a wheel has some
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path / "file"))
    check = checks.check_kernel_cache(HEALTHY)
    assert check.status == "fail" and "KIMI_LITE_CACHE" in check.fix
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))
    assert "empty" in checks.check_kernel_cache(HEALTHY).finding


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", np.random.default_rng(0))


def test_a_model_is_looked_at(tiny):
    found = {check.name: check for check in doctor_model.model_checks(tiny, HEALTHY)}
    assert {name: check.status for name, check in found.items()} == {"model": "ok", "tokenizer": "ok", "plan": "ok"}
    assert "one file" in found["model"].finding and "fits" in found["plan"].finding


def test_a_missing_shard_and_a_small_machine_are_lines(tmp_path, tiny):
    first = write_tiny_gguf(tmp_path / "big.gguf", np.random.default_rng(0), max_tensors_per_shard=20)
    next(path for path in tmp_path.glob("*.gguf") if path != first).unlink()
    (check,) = doctor_model.model_checks(first, HEALTHY)
    assert check.status == "fail" and "missing" in check.finding and check.fix
    small = with_hardware(ram_free_bytes=1 << 20, gpu=None)
    found = [check for check in doctor_model.model_checks(tiny, small) if check.name == "plan"]
    assert found[0].status == "fail" and "RAM" in found[0].finding


def test_wrong_ids_are_found(tiny, monkeypatch):
    store = GGUFStore.open(tiny)
    monkeypatch.setattr(doctor_model, "KIMI_VOCABULARY", 300)  # the tiny model's: its ids cannot be Kimi's
    check = doctor_model.check_tokenizer(store)
    assert check.status == "fail" and "other ids than the vendor's" in check.finding
    monkeypatch.setattr(doctor_model.Tokenizer, "decode", lambda self, ids: "?")
    monkeypatch.setattr(doctor_model, "KIMI_VOCABULARY", 0)
    assert "does not come back" in doctor_model.check_tokenizer(store).finding


def test_the_golden_ids_are_those_of_the_tokenizer_s_tests():
    source = (Path(__file__).parents[2] / "text/test_tokenizer.py").read_text(encoding="utf-8")
    for ids in doctor_model.GOLDEN.values():
        assert str(list(ids)) in source


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


@pytest.fixture
def healthy(monkeypatch):
    monkeypatch.setattr(checks, "gather", lambda path, is_measuring: with_hardware(gpu=None))
    return monkeypatch


@pytest.mark.parametrize("width", [None, 40, 60, 80, 100, 200])
def test_the_report_has_the_width_of_the_terminal(healthy, tiny, width, monkeypatch, tmp_path):
    """80 columns in a pipe; lines end between words."""
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))  # nothing is compiled into it between the two reports
    monkeypatch.setenv("COLUMNS", "1000")
    words = {*run("-m", tiny, "--quick").stdout.split()}
    monkeypatch.setenv("COLUMNS", str(width or ""))
    result = run("-m", tiny, "--quick")
    assert result.exit_code == 2, "an NVIDIA GPU without its driver is a failure"
    lines = result.stdout.splitlines()
    for line in lines:
        text = line[17 if (width or 80) >= 60 else 5 :]
        assert len(line) <= (width or 80) or len(text.split()) == 1, line  # a path alone may be longer
        assert {word.removesuffix(":") for word in line.split()} <= {word.removesuffix(":") for word in words}, line
    statuses = {line.split()[0] for line in lines if line and not line.startswith(" ")}
    assert statuses <= {"ok", "warn", "fail", lines[-1].split()[0]}
    assert "→" in result.stdout and lines[-1].endswith("1 fail")


def test_json_and_exit_codes(healthy, tiny):
    healthy.setattr(
        checks, "gather", lambda path, is_measuring: replace(with_hardware(gpu=None), has_nvidia_device=False)
    )
    result = run("--json", "-m", tiny)
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert [check["status"] for check in document["checks"]].count("warn") == 1
    assert document["hardware"]["ram_total_bytes"] == 256 * GIB and document["packages"]["numba"] == "1.0"


def test_warming_runs_the_model(healthy, tiny):
    result = run("-m", tiny, "--warm", "--json")
    assert json.loads(result.stdout)["checks"][-1] == {
        "name": "warm",
        "status": "ok",
        "finding": "kernels of tiny.gguf are compiled; 2 tokens ran",
        "fix": "",
    }
    assert doctor_model.warm(tiny.with_name("none.gguf")).status == "fail"


def test_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path))
    facts = checks.gather(None, is_measuring=False)
    assert facts.isa == tuple(isa()) and facts.packages["numpy"] and facts.python == sys.version_info[:3]
    assert [check(facts).status for check in checks.SYSTEM_CHECKS if check is not checks.check_memory]


def test_a_model_on_a_drive_of_windows(tmp_path, monkeypatch):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    monkeypatch.setattr(doctor_model.host, "is_on_windows_drive", lambda place: place == path)
    found = next(check for check in doctor_model.model_checks(path, HEALTHY) if check.name == "place")
    assert found.status == "warn" and "below ~" in found.fix
