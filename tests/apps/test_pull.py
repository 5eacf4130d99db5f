"""`pull`, `models` and `-m hf:` as they are typed, against a hub on this machine."""

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.cli import app
from kimi_lite.errors import KimiLiteError
from kimi_lite.hub import fetch as fetching
from kimi_lite.hub.cache import CachedRepository
from kimi_lite.hub.library import local_models
from kimi_lite.tools.make.vision import K2_5_TOWER, write_tower
from tests.apps.terminal import Terminal
from tests.gguf.gguf_bytes import GGUFBytes, tensor
from tests.hub.conftest import home, hub  # noqa: F401
from tests.hub.hub_server import Fault
from tests.test_readme import READMES, commands
from tests.tiny import write_tiny_gguf


@pytest.fixture(scope="module")
def quants(tmp_path_factory) -> dict[str, bytes]:
    """Two that run, one of another program, a vision tower."""
    folder, files = tmp_path_factory.mktemp("quants"), {}
    for label, kind in (("Q8_0", "Q8_0"), ("UD-TQ2_0", "TQ2_0")):
        write_tiny_gguf(
            folder / "x.gguf", np.random.default_rng(0), types={"_exps": kind}, expert_feed_forward_size=256
        )
        files[f"{label}/tiny-{label}.gguf"] = (folder / "x.gguf").read_bytes()
    ik = GGUFBytes(tensors=[tensor("blk.0.ffn_up.weight", [256], 133)], data=bytes(2000)).build()
    return files | {"tiny-smol-Q6_0.gguf": ik, "mmproj-F16.gguf": b"tower" * 300}


@pytest.fixture
def repo(hub, quants, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "100")
    return hub.add("tiny/Tiny-GGUF", quants)


def kimi_lite(line: str, stdin: str | None = None) -> str:
    """Stdout and stderr of a command that ends well."""
    done = CliRunner().invoke(app, shlex.split(line), input=stdin, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def answers(model: str) -> bool:
    """Whether `run` loads the model and samples what it is asked for."""
    said = kimi_lite(f"run -q {model} hello -n 2 -c 128 --no-prefix-cache --json")
    return json.loads(said)["stats"]["prompt_tokens"] > 0


def refusal(line: str) -> KimiLiteError:
    done = CliRunner().invoke(app, shlex.split(line))
    assert isinstance(done.exception, KimiLiteError), (done.exception, done.output)
    return done.exception


def test_a_repository_is_listed_with_what_fits(hub, repo):  # noqa: F811
    said = kimi_lite("pull tiny/Tiny-GGUF")
    assert "tiny/Tiny-GGUF: 3 models" in said and "* Q8_0" in said and "Q8_0 experts, F32 rest" in said
    assert "smol-Q6_0" in said and "not read here: Q6_0, a type of ik_llama.cpp" in said
    assert said.rstrip().endswith("kimi-lite pull tiny/Tiny-GGUF:Q8_0")
    assert not list(local_models())
    document = json.loads(kimi_lite("pull tiny/Tiny-GGUF --json"))
    rows = {row["name"]: row for row in document["models"]}
    assert document["best"] == "Q8_0" and document["commit"] == repo.commit
    assert rows["UD-TQ2_0"]["verdict"] == "fits" and rows["UD-TQ2_0"]["expected_tok_s"] > 0
    assert rows["smol-Q6_0"]["verdict"] is None and "Q6_0" in rows["smol-Q6_0"]["problem"]
    assert rows["Q8_0"]["bytes"] == len(repo.files["Q8_0/tiny-Q8_0.gguf"])


def test_the_verdict_is_that_of_the_plan_for_the_machine_that_is_asked_for(hub, repo):  # noqa: F811
    listed = json.loads(kimi_lite("pull tiny/Tiny-GGUF --json --ram 300M -c 2K --kv-dtype f32"))
    for row in listed["models"]:
        if row["types"]:
            line = f"plan -m hf:tiny/Tiny-GGUF:{row['name']} --json --ram 300M -c 2K --kv-dtype f32"
            done = CliRunner().invoke(app, shlex.split(line))
            assert json.loads(done.stdout.splitlines()[0])["verdict"] == row["verdict"]


def test_a_quant_is_fetched_with_its_tower_and_used_by_name(hub, repo, quants):  # noqa: F811
    said = kimi_lite("pull tiny/Tiny-GGUF:tq2_0")
    assert "with mmproj-F16.gguf" in said and said.rstrip().endswith("kimi-lite chat -m hf:tiny/Tiny-GGUF:UD-TQ2_0")
    cached = CachedRepository.of("tiny/Tiny-GGUF")
    fetched = {path.name: path.read_bytes() for path in cached.snapshot(repo.commit).rglob("*.gguf")}
    assert fetched == {"tiny-UD-TQ2_0.gguf": quants["UD-TQ2_0/tiny-UD-TQ2_0.gguf"], "mmproj-F16.gguf": b"tower" * 300}
    assert "is here already (Hugging Face cache)" in kimi_lite("pull tiny/Tiny-GGUF:UD-TQ2_0")
    requests = len(hub.seen)
    assert answers("-hf tiny/Tiny-GGUF:TQ2_0") and len(hub.seen) == requests  # without a word to the hub
    listed = kimi_lite("models")
    assert "tiny/Tiny-GGUF:UD-TQ2_0" in listed and "TQ2_0 experts, F32 rest · Hugging Face cache" in listed


def test_a_model_that_is_named_is_fetched_by_the_command_that_needs_it(hub, repo):  # noqa: F811
    assert "is not on this machine" in refusal("run -m hf:tiny/Tiny-GGUF:Q8_0 --offline hello").message
    assert "is not on this machine" in refusal("doctor --quick -m hf:tiny/Tiny-GGUF:Q8_0").message
    assert answers("-m hf:tiny/Tiny-GGUF:Q8_0") and answers("-m hf:tiny/Tiny-GGUF:Q8_0 --offline")
    assert "holds no Q5_K" in refusal("run -m hf:tiny/Tiny-GGUF:Q5_K hello").message


def test_names_without_their_prefix_are_told_about_it(hub, repo):  # noqa: F811
    assert refusal("run -m tiny/Tiny-GGUF:Q8_0 hello").hint == "A model of a hub: -m hf:tiny/Tiny-GGUF:Q8_0"


def test_what_would_not_run_is_refused_before_it_is_fetched(hub, repo):  # noqa: F811
    sent = hub.file_bytes_sent()
    for line in ("pull tiny/Tiny-GGUF:Q8_0 --ram 1M", "run -m hf:tiny/Tiny-GGUF:Q8_0 --ram 1M hello"):
        error = refusal(line)
        assert "RAM" in error.message
    assert not list(local_models())
    assert hub.file_bytes_sent() - sent < len(repo.files["Q8_0/tiny-Q8_0.gguf"])
    assert "--force" in refusal("pull tiny/Tiny-GGUF:Q8_0 --ram 1M").hint
    assert "Q6_0" in refusal("pull tiny/Tiny-GGUF:smol-Q6_0").message
    kimi_lite("pull tiny/Tiny-GGUF:Q8_0 --ram 1M --force --no-mmproj")
    (model,) = local_models()
    assert model.label == "Q8_0" and model.tower is None


def test_an_interrupted_pull_goes_on(hub, repo, quants):  # noqa: F811
    hub.faults[:] = [Fault("tiny-Q8_0.gguf"), Fault("tiny-Q8_0.gguf", after=400_000)]
    hub.faults += [Fault("tiny-Q8_0.gguf", status=503, times=99)]
    assert "goes on where it was" in refusal("pull tiny/Tiny-GGUF:Q8_0 --no-mmproj").hint
    hub.faults.clear()
    assert "tiny/Tiny-GGUF:unfinished" in (listed := kimi_lite("models")) and "pull goes on with it" in listed
    sent = hub.file_bytes_sent()
    kimi_lite("pull tiny/Tiny-GGUF:Q8_0 --no-mmproj")
    assert hub.file_bytes_sent() - sent == len(quants["Q8_0/tiny-Q8_0.gguf"]) - 400_000
    assert "unfinished" not in kimi_lite("models")


def test_offline_only_what_is_here_is_found(hub, repo, monkeypatch):  # noqa: F811
    kimi_lite("pull tiny/Tiny-GGUF:Q8_0 --no-mmproj")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "is here already" in kimi_lite("pull tiny/Tiny-GGUF:Q8_0")
    assert "HF_HUB_OFFLINE forbids" in refusal("pull tiny/Tiny-GGUF:UD-TQ2_0").message
    assert answers("-m hf:tiny/Tiny-GGUF:Q8_0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "with mmproj-F16.gguf" in kimi_lite("pull tiny/Tiny-GGUF:Q8_0")  # the tower alone was missing
    assert "mmproj-F16.gguf" in {path.name for path in (Path(os.environ["HF_HOME"]) / "hub").rglob("*.gguf")}


def test_a_gated_repository_is_told_once(hub, repo):  # noqa: F811
    repo.is_gated, repo.token = True, "right"
    for line in ("pull tiny/Tiny-GGUF", "pull tiny/Tiny-GGUF:Q8_0", "run -m hf:tiny/Tiny-GGUF:Q8_0 hello"):
        error = refusal(line)
        assert "is gated" in error.message and "accept its conditions" in error.hint and "--force" not in error.hint


def test_a_full_disk_is_said_before(hub, repo, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fetching, "_free_bytes", lambda: 1_000_000)
    assert "too small for the download: need" in refusal("pull tiny/Tiny-GGUF:Q8_0").message


def test_deleting_asks_and_says_what(hub, repo):  # noqa: F811
    kimi_lite("pull tiny/Tiny-GGUF:Q8_0")
    assert "Add --yes." in refusal("models --rm tiny/Tiny-GGUF:Q8_0").hint  # no terminal
    terminal = Terminal("kimi_lite", "models", "--rm", "tiny/Tiny-GGUF:Q8_0")
    terminal.wait_for("[y/N] ")
    terminal.type("n\n")
    assert terminal.wait() == 2 and list(local_models())
    terminal.close()
    assert "deleted tiny/Tiny-GGUF:Q8_0" in kimi_lite("models --rm tiny/Tiny-GGUF:Q8_0 --yes")
    assert not list(local_models()) and "No models are here" in kimi_lite("models")
    assert json.loads(kimi_lite("models --json")) == {"models": []}


def test_a_checkpoint_is_fetched_for_quantize(hub):  # noqa: F811
    files = {"config.json": b"{}", "model.safetensors": b"w" * 5000, "tiktoken.model": b"IQ== 0"}
    hub.add("maker/Tiny", files | {"README.md": b"#", "modeling.py": b"import os"})
    command = kimi_lite("pull maker/Tiny").rstrip().rpartition("\n")[2]
    assert command.startswith("kimi-lite quantize ") and command.endswith("OUT.gguf --recipe RECIPE")
    folder = Path(shlex.split(command)[2])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    listed = kimi_lite("models")
    assert "maker/Tiny:checkpoint" in listed and "kimi-lite quantize" in listed
    hub.add("maker/Other", files)
    assert "maker/Other is a checkpoint" in refusal("plan -m hf:maker/Other").message
    sent = hub.file_bytes_sent()
    assert "GGUF is needed to run it" in refusal("run -m hf:maker/Other hello").message
    assert hub.file_bytes_sent() == sent
    assert "deleted maker/Tiny:checkpoint" in kimi_lite("models --rm maker/Tiny --yes") and not list(local_models())


def test_without_the_extra_it_is_said_what_to_install(hub, repo, monkeypatch):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "pip install 'kimi-lite[pull]'" in refusal("pull tiny/Tiny-GGUF").hint


def test_commands_of_the_readmes_run(hub, quants):  # noqa: F811
    lines = {line for path in READMES for line in commands(path) if re.match(r"kimi-lite (pull|models)", line)}
    hub.add("unsloth/Kimi-K2.5-GGUF", {path.replace("TQ2_0", "TQ1_0"): data for path, data in quants.items()})
    assert len(lines) >= 3
    for line in sorted(lines):
        kimi_lite(line.removeprefix("kimi-lite "))


def test_the_vision_file_above_the_folder_of_a_quant_is_found(hub, quants, tmp_path):  # noqa: F811
    small = replace(K2_5_TOWER, hidden=64, feed_forward=96, heads=4, layers=1, text_hidden=256)
    write_tower(tmp_path / "mmproj-F16.gguf", small)
    hub.add("tiny/Tiny-GGUF", quants | {"mmproj-F16.gguf": (tmp_path / "mmproj-F16.gguf").read_bytes()})
    line = "plan -m hf:tiny/Tiny-GGUF:Q8_0 --json"
    before, _ = json.loads(kimi_lite(line)), kimi_lite("pull tiny/Tiny-GGUF:Q8_0")
    after, blind = json.loads(kimi_lite(line)), json.loads(kimi_lite(f"{line} --vision off"))
    sizes = [
        sum(row["num_bytes"] for row in plan["rows"] if row["part"] == "vision") for plan in (before, after, blind)
    ]
    assert sizes[0] > 0.9 * sizes[1] > 0 and sizes[2] == 0
