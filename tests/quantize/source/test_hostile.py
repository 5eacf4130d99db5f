"""Checkpoint folders that lie: any value anywhere in any of their JSON files and headers, or any bytes, is a model or a
sentence."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.arch.moonvit import read_checkpoint_tower
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.plan.subject import find_subject
from kimi_lite.quantize.convert import open_model
from tests.checkpoints import make_checkpoint

SCALARS = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(max_size=8), st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([0, 1, -1, 2, 3, 1 << 31, 1 << 63, "", "..", "../x", "/etc/passwd", "a\x00b", "\x1b[2J", "\ud800"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
KINDS = ("kimi_int4", "deepseek_v2", "deepseek_v3_fp8")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        make_checkpoint(folders[kind], kind, n_routed_experts=4 if kind != "deepseek_v3_fp8" else 16)
    return folders


def places(content: object, path: tuple = ()) -> list[tuple]:
    """Every key and index of nested content, as paths."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = []
    for key, value in list(items)[:40]:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def mutate(content: object, data: st.DataObject) -> object:
    """Another value, a missing key or an added one, at one to three places."""
    for _ in range(data.draw(st.integers(1, 3))):
        known = places(content)
        if not known:
            return content
        *way, last = data.draw(st.sampled_from(known))
        inside = content
        for key in way:
            inside = inside[key]
        how = data.draw(st.sampled_from(["change", "change", "change", "delete", "add"]))
        if how == "delete":
            inside.pop(last)
        elif how == "add" and isinstance(inside, dict):
            inside[data.draw(st.text(max_size=6))] = data.draw(VALUES)
        else:
            inside[last] = data.draw(VALUES)
    return content


def mutate_file(file: Path, data: st.DataObject) -> None:
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little") if file.suffix == ".safetensors" else 0
    text, rest = (whole[8 : 8 + header], whole[8 + header :]) if header else (whole, b"")
    how = data.draw(st.sampled_from(["json"] * 6 + ["bytes", "cut", "deep", "bom", "root"]))
    if how == "bytes":
        text = data.draw(st.binary(max_size=40))
    elif how == "cut":
        text = text[: data.draw(st.integers(0, len(text)))]
    elif how == "deep":
        text = b"[" * 100_000
    elif how == "bom":
        text = b"\xef\xbb\xbf" + text
    elif how == "root" or file.suffix not in (".json", ".safetensors"):
        text = json.dumps(data.draw(VALUES)).encode()
    else:
        text = json.dumps(mutate(json.loads(text), data)).encode()
    file.unlink()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest if header else text)


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_content_is_a_model_or_a_sentence(originals, tmp_path, data):
    original = originals[data.draw(st.sampled_from(KINDS))]
    folder = tmp_path / "hf"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    names = sorted(path.name for path in folder.iterdir())
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        mutate_file(folder / name, data)
    for read in (lambda: open_model(folder).make_metadata(BY_NAME["Q8_0"]), lambda: read_checkpoint_tower(folder),
                 lambda: find_subject(str(folder))):  # fmt: skip
        try:
            read()
        except KimiLiteError as error:
            assert error.message.isprintable(), ascii(error.message)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("kind", KINDS)
def test_what_folders_in_the_wild_differ_in(originals, tmp_path, kind):
    """Byte order marks, a consolidated copy, another shard's leftovers, links into a cache: the same model."""
    wanted = open_model(originals[kind])
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    for number, path in enumerate(sorted(originals[kind].iterdir())):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
        (blobs / str(number)).write_bytes(content)
        (folder / path.name).symlink_to(blobs / str(number))
    shutil.copy(next(originals[kind].glob("*.safetensors")), folder / "consolidated.safetensors")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    have = open_model(folder)
    assert [(t.name, t.shape, t.stored) for t in have.tensors] == [(t.name, t.shape, t.stored) for t in wanted.tensors]
    ours, theirs = (model.make_metadata(BY_NAME["Q8_0"]) for model in (have, wanted))
    assert {key: value for key, value in ours.items() if key != "general.name"} == {
        key: value for key, value in theirs.items() if key != "general.name"
    }
