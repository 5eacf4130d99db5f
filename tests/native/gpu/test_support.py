"""Why the kernels cannot run, in a sentence with a remedy, for every thing that may be missing."""

import sys
import warnings

import pytest
import torch

from kimi_lite.native.gpu import cuda_driver, support, trial
from kimi_lite.native.gpu.support import driver_problem, needs_compiler, why_unusable


@pytest.fixture
def gpu(monkeypatch):
    """A machine with two GPUs, and how its parts answer: changes are made by the test."""
    answers = {"own": None, "triton": None, "compiler": None}
    installed = []
    monkeypatch.setattr(support, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9) if index == 0 else (7, 5))
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    monkeypatch.setattr(support, "compiler_problem", lambda: answers["compiler"])
    monkeypatch.setattr(cuda_driver, "install", lambda: installed.append("own"))
    monkeypatch.setattr(cuda_driver, "uninstall", lambda: installed.append("triton"))
    monkeypatch.setattr(trial, "try_a_kernel", lambda device: answers[installed[-1]])
    answers["installed"] = installed
    return answers


@pytest.mark.parametrize("missing", ["triton", "torch"])
@pytest.mark.parametrize(("system", "remedy"), [("linux", "pip install"), ("win32", "WSL2"), ("darwin", "on Linux")])
def test_a_missing_package(missing, system, remedy, monkeypatch):
    find = support.importlib.util.find_spec
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(support.platform, "system", lambda: {"win32": "Windows"}.get(system, system.title()))
    unusable = why_unusable()
    assert f"{missing!r}, which is not installed" in unusable.problem
    assert (remedy if missing == "triton" else "pip install torch") in unusable.remedy


def test_the_interpreter_needs_no_gpu():
    assert why_unusable() is None


def test_torch_without_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in why_unusable().problem
    monkeypatch.setattr(support.platform, "system", lambda: "Windows")
    assert "WSL2" in why_unusable().remedy
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(support, "_cuda_of_driver", lambda: "12.8")
    assert "serves CUDA 12.8" in why_unusable().problem and "580" in why_unusable().remedy
    monkeypatch.setattr(support, "_cuda_of_driver", lambda: "")
    assert "sees 2 devices" in why_unusable().problem and "nvidia-smi" in why_unusable().remedy


@pytest.mark.parametrize(
    ("built", "served", "remedy"),
    [
        ("12.8", "12.2", None),  # within a major version all run
        ("12.8", "13.0", None),
        ("13.0", "12.9", "driver 580 or newer, or pip install torch --index-url"),
        ("13.0", "11.4", "driver 580 or newer."),
        ("14.1", "13.0", "a newer driver."),
        ("", "12.9", None),
        ("12.8", "", None),
    ],
)
def test_a_driver_older_than_the_cuda_build(built, served, remedy):
    problem = driver_problem(built, served, "570.10")
    assert problem is None if remedy is None else remedy in problem.remedy and "driver 570.10 serves" in problem.problem


def test_the_device_that_is_asked_for(gpu):
    assert why_unusable(0) is None
    assert "7.5; the kernels need 8.0" in why_unusable(1).problem
    assert "no CUDA device 2: torch sees 2" in why_unusable(2).problem


def test_no_compiler_is_needed(gpu):
    gpu["compiler"] = support.Unusable("No gcc.", "Install gcc.")
    assert why_unusable() is None and gpu["installed"] == ["own"]


def test_tritons_own_driver_where_ours_fails(gpu):
    gpu["own"] = "a kernel gave 1 instead of 2"
    with pytest.warns(RuntimeWarning, match="Triton's driver.*gave 1 instead of 2"):
        assert why_unusable() is None
    assert gpu["installed"] == ["own", "triton"]


def test_an_unknown_triton_comes_with_its_own_driver(gpu, monkeypatch):
    monkeypatch.setattr("triton.__version__", "4.0.0")
    assert why_unusable() is None and gpu["installed"] == ["triton"]
    gpu["compiler"] = support.Unusable("No gcc.", "Install gcc.")
    assert why_unusable() is None and gpu["installed"] == ["triton", "own"]


def test_nothing_works(gpu):
    gpu |= {"own": "CUDA error: no kernel image", "triton": "ptxas: not found"}
    unusable = why_unusable()
    assert "no kernel image" in unusable.problem and "ptxas: not found" in unusable.problem
    gpu["compiler"] = support.Unusable("No gcc.", "Install gcc.")
    unusable = why_unusable()
    assert "no kernel image" in unusable.problem and "No gcc." in unusable.problem and unusable.remedy == "Install gcc."


def test_what_a_compiler_needs(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(support.shutil, "which", lambda name: None)
    monkeypatch.setattr(support.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "gcc or clang) and Python's headers" in support.compiler_problem().problem
    (tmp_path / "Python.h").touch()
    assert "Python" not in support.compiler_problem().problem
    monkeypatch.setenv("CC", "tcc")
    assert support.compiler_problem() is None


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("ID=ubuntu\nID_LIKE=debian", "apt install gcc python3-dev"),
        ("ID=debian", "apt install gcc python3-dev"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"', "dnf install gcc python3-devel"),
        ('ID="rhel"', "dnf install"),
        ("ID=arch", "pacman -S gcc"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"', "zypper install"),
        ("ID=alpine", "apk add"),
        ("ID=nixos", "with your system's packages"),
        ("", "with your system's packages"),
    ],
)
def test_the_remedy_is_the_distributions(release, command):
    assert command in support.compiler_remedy(release)


@pytest.mark.parametrize(
    ("version", "needs"), [("3.4.0", True), ("3.5.1", False), ("3.9.0+git1", False), ("3.10.0", True)]
)
def test_tritons_whose_driver_we_replace(version, needs):
    assert needs_compiler(version) is needs
