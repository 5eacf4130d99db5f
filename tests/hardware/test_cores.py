"""Threads worth starting: CPU affinity, second hardware threads and CPU quotas of both kinds of cgroups."""

import math
import os

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.hardware import host


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path_factory, monkeypatch):
    """Makes a machine of `num_cores` cores with `threads_a_core` hardware threads, of which `allowed` may be used."""

    def make(num_cores, threads_a_core=1, allowed=None):
        root = tmp_path_factory.mktemp("root")
        logical = num_cores * threads_a_core
        for cpu in range(logical):
            siblings = ",".join(str(cpu % num_cores + i * num_cores) for i in range(threads_a_core))
            write(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{siblings}\n")
        monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: num_cores * (threads_a_core if logical else 1))
        cpus = set(range(logical)) if allowed is None else set(allowed)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus, raising=False)
        return root

    return make


QUOTA_FILES = [  # /proc/self/cgroup, and where a quota of that kind may stand
    ("0::/a/b", "cpu.max", ["a/b", "a", ""]),
    ("0::/../outside", "cpu.max", [""]),
    ("9:cpu,cpuacct:/a/b\n0::/", "cpu.cfs_quota_us", ["cpu,cpuacct/a/b", "cpu,cpuacct/a", "cpu,cpuacct", "cpu"]),
    ("9:cpuacct,cpu:/a", "cpu.cfs_quota_us", ["cpu,cpuacct/a", "cpuacct,cpu/a", "cpu/a", "cpu"]),
    ("1:name=systemd:/\n2:cpu:/docker/0123\n0::/", "cpu.cfs_quota_us", ["cpu/docker/0123", "cpu"]),
    ("1:memory:/\n0::/a", "cpu.max", ["unified/a", "unified", "a"]),
]


def write_quota(root, group, file, folder, num_cores, period=100_000):
    write(root / "proc/self/cgroup", f"{group}\n")
    quota = "max" if num_cores is None else str(round(num_cores * period))
    if file == "cpu.max":
        write(root / "sys/fs/cgroup" / folder / file, f"{quota} {period}\n")
    else:
        write(root / "sys/fs/cgroup" / folder / file, f"{quota.replace('max', '-1')}\n")
        write(root / "sys/fs/cgroup" / folder / "cpu.cfs_period_us", f"{period}\n")


@pytest.mark.parametrize(("group", "file", "folders"), QUOTA_FILES)
def test_quotas_are_found_wherever_they_stand(machine, group, file, folders):
    for folder in folders:
        root = machine(16)
        write_quota(root, group, file, folder, 3)
        cores = host.usable_cores(root)
        assert (cores.num_usable, cores.most_threads, cores.num_machine) == (3, 3, 16), folder
        assert "quota is 3 of 16 cores" in cores.reasons[0] and file in cores.reasons[0]
        write_quota(root, group, file, folder, None)
        assert host.usable_cores(root) == host.Cores(16, 16, 16)


def test_the_tightest_of_nested_groups_counts(machine):
    root = machine(16)
    for folder, cores in (("a/b/c", 8), ("a/b", 2.5), ("a", 4)):
        write_quota(root, "0::/a/b/c", "cpu.max", folder, cores, period=20_000)
    assert host.cpu_quota(root).num_cores == 2.5 and host.cpu_quota(root).file.parent.name == "b"
    assert (host.usable_cores(root).num_usable, host.usable_cores(root).most_threads) == (2, 3)


@pytest.mark.parametrize("text", ["", "max", "max 100000", "-1 100000", "x y", "200000 0", "200000"])
def test_odd_files_are_no_traceback(machine, text):
    root = machine(4)
    write(root / "proc/self/cgroup", "0::/\n")
    write(root / "sys/fs/cgroup/cpu.max", text)
    assert host.usable_cores(root).num_usable == (2 if text.startswith("200000") else 4)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data(), num_cores=st.integers(1, 64), threads_a_core=st.sampled_from([1, 2]))
def test_generated_machines(machine, data, num_cores, threads_a_core):
    """Never more threads than cores, affinity or quota allow, never none, and a reason wherever cores are left out."""
    cpus = list(range(num_cores * threads_a_core))
    allowed = data.draw(st.sets(st.sampled_from(cpus), min_size=1))
    quota = data.draw(st.none() | st.floats(0.05, 200))
    root = machine(num_cores, threads_a_core, allowed)
    write_quota(root, "0::/box", "cpu.max", "box", quota)
    cores = host.usable_cores(root)
    physical = len({cpu % num_cores for cpu in allowed})
    quota = math.inf if quota is None else round(quota * 100_000) / 100_000
    assert cores.num_usable == max(1, min(physical, math.floor(min(quota, 1e6))))
    assert cores.num_usable <= cores.most_threads <= max(1, min(len(allowed), math.ceil(min(quota, 1e6))))
    assert bool(cores.reasons) == (cores.num_usable < num_cores or quota < physical)
    for asked in (None, 1, 4, 10_000):
        num_threads, warning = cores.choose_threads(asked)
        assert 1 <= num_threads <= cores.most_threads and num_threads == min(asked or cores.num_usable, num_threads)
        assert bool(warning) == (asked is not None and num_threads < asked)
    if cores.reasons:
        assert all(reason in warning for reason in cores.reasons)


def test_an_affinity_to_second_hardware_threads_is_one_core(machine):
    cores = host.usable_cores(machine(4, 2, allowed={1, 5}))
    assert (cores.num_usable, cores.most_threads) == (1, 2)
    assert cores.reasons == ("the CPU affinity allows 1 of 4 cores",)
    assert cores.choose_threads(64) == (
        2,
        "-t 64 starts 2: this process can use 2 hardware threads; the CPU affinity allows 1 of 4 cores.",
    )


def test_systems_without_affinity_or_load(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert host.usable_cores().num_usable == 1
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert host.load_average() is None
