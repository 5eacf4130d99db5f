"""Bad files: whatever is wrong, the answer is a KimiLiteError that says what, never a traceback, a crash or a hang."""

import re
import struct
from datetime import timedelta
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.tensors import check_tensors
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.header import read_header
from kimi_lite.gguf.metadata import HeaderGoesOn
from kimi_lite.gguf.store import GGUFStore
from tests.gguf.gguf_bytes import STRING, U32, GGUFBytes, array_key, key, number_key, tensor, text
from tests.tiny import write_tiny_gguf

U32_MAX, U64_MAX = (1 << 32) - 1, (1 << 64) - 1


def refusal(path) -> KimiLiteError:
    """What the store says about the file; both parts must be there."""
    with pytest.raises(KimiLiteError) as error:
        GGUFStore.open(path)
    assert error.value.hint
    return error.value


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A whole model of 0.5 MB."""
    config = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_experts": 4,
        "expert_feed_forward_size": 32,
        "feed_forward_size": 64,
    }
    path = tmp_path_factory.mktemp("damage") / "small.gguf"
    write_tiny_gguf(path, np.random.default_rng(3), **config)
    return path.read_bytes()


def load(path) -> None:
    """All that a load reads before it computes: headers, configuration, shapes, and the ends of every tensor."""
    store = GGUFStore.open(path)
    config = ModelConfig.from_metadata(store.metadata, path.name)
    check_tensors(store, config)
    for view in store.tensors.values():
        assert view.data.ravel()[[0, -1]].shape == (2,)


def refuses(path) -> bool:
    """True for a sentence fit to be shown, False for a load; anything else goes through to pytest."""
    try:
        load(path)
    except KimiLiteError as error:
        refused = error
    else:
        return False
    assert path.name in refused.message, refused.message
    assert refused.message.isprintable(), ascii(refused.message)
    assert len(refused.message) < 2000, refused.message
    return True


def test_cut_at_every_4_kb(tmp_path, small):
    path = tmp_path / "small.gguf"
    path.write_bytes(small)
    load(path)
    cuts = [
        *range(0, len(small) - 16, 4096),
        *range(1, len(small), 9973),
        len(small) - 17,
    ]  # 16 bytes of padding are no loss
    for size in sorted(cuts, reverse=True):
        with open(path, "r+b") as file:
            file.truncate(size)
        message = refusal(path).message
        assert "cut short" in message or "whole" in message or "empty" in message or "must start" in message, message
        assert f"{size:,}" in message or "left" in message or size < 4, message


def test_cut_inside_the_header(tmp_path, small):
    reader_end = small.index(b"exp_probs_b.bias") + 40
    data = memoryview(small)
    for size in range(4, reader_end, 7):
        with pytest.raises(KimiLiteError, match="cut short"):
            read_header(tmp_path / "small.gguf", data[:size])


def header_fields(path) -> list[tuple[int, int]]:
    """(offset, size) of every number in the header, found by the `gguf` package; of long arrays only the beginning."""
    reader = gguf.GGUFReader(path)
    places = [(0, 4)]
    for field in [*reader.fields.values(), *(info.field for info in reader.tensors)]:
        at = field.offset
        for part in field.parts[:12]:
            if part.dtype != np.uint8:
                places += [(at + i * part.itemsize, part.itemsize) for i in range(part.size)]
            at += part.nbytes
    return places


def test_every_field_of_the_header_replaced(tmp_path, small):
    path = tmp_path / "small.gguf"
    path.write_bytes(small)
    places = header_fields(path)
    assert len(places) > 300
    num_refused = 0
    for at, size in places:
        for value in (0, 1, 9, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1):
            damaged = bytearray(small)
            damaged[at : at + size] = value.to_bytes(size, "little")
            path.write_bytes(damaged)
            num_refused += refuses(path)
    assert num_refused > 4 * len(places)


hostile = settings(
    max_examples=1000,
    deadline=timedelta(seconds=10),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@hostile
@given(data=st.data())
def test_header_bytes_overwritten(tmp_path, small, data):
    damaged = bytearray(small)
    header_bytes = small.index(b"exp_probs_b.bias") + 64
    numbers = st.sampled_from([0, 1, 31, 1 << 20, 1 << 30, U32_MAX, 1 << 40, 1 << 63, U64_MAX]).map(
        struct.Struct("<Q").pack
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_bytes))
        new = data.draw(numbers | st.binary(min_size=1, max_size=8))
        damaged[at : at + len(new)] = new
    path = tmp_path / "small.gguf"
    path.write_bytes(damaged)
    refuses(path)


@hostile
@given(at=st.integers(0, 14_000), removed=st.integers(0, 64), inserted=st.binary(max_size=64))
def test_header_bytes_inserted_and_removed(tmp_path, small, at, removed, inserted):
    path = tmp_path / "small.gguf"
    path.write_bytes(small[:at] + inserted + small[at + removed :])
    refuses(path)


@hostile
@given(
    content=st.binary(max_size=200),
    magic=st.sampled_from([b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"GGUF\x02\x00\x00\x00"]),
)
def test_noise(tmp_path, content, magic):
    path = tmp_path / "noise.gguf"
    path.write_bytes(magic + content)
    assert refuses(path)


ONE = tensor("a.weight", [8])
CASES = {
    "safetensors": (GGUFBytes(magic=b"\x08\x01\x00\x00"), "not a GGUF file", "kimi-lite quantize"),
    "version 1": (GGUFBytes(version=1), "version 1, and versions 2 and 3", ""),
    "version 4": (GGUFBytes(version=4), "version 4, and versions 2 and 3", ""),
    "big-endian": (GGUFBytes(version=3 << 24), "big-endian", ""),
    "many keys": (GGUFBytes(num_keys=U64_MAX), "claims 18,446,744,073,709,551,615 metadata keys", ""),
    "more keys than bytes": (GGUFBytes(num_keys=60_000), "a list of 60,000 metadata keys needs 840,000 bytes", ""),
    "many tensors": (GGUFBytes(num_tensors=1 << 62), "tensors, and at most 262,144", ""),
    "more tensors": (GGUFBytes(num_tensors=2), "cut short|name of tensor 2 of 2", ""),
    "key twice": (GGUFBytes(keys=[number_key("a", 1), number_key("a", 1)]), "'a' appears twice", ""),
    "key without name": (GGUFBytes(keys=[number_key("", 1)]), "key 1 has no name", ""),
    "key not UTF-8": (GGUFBytes(keys=[key(b"\xff\xfe", 4, bytes(4))]), "name of metadata key 1 of 1 .* not UTF-8", ""),
    "text not UTF-8": (GGUFBytes(keys=[key("a", 8, text(b"\xc3("))]), "the text of 'a' .* not UTF-8", ""),
    "long text": (
        GGUFBytes(keys=[key("a", 8, struct.pack("<Q", U64_MAX))]),
        "the text of 'a' needs 18,446,744,073,709,551,615",
        "",
    ),
    "value type": (GGUFBytes(keys=[key("a", 13, bytes(8))]), "'a' has value type 13", ""),
    "half a truth": (GGUFBytes(keys=[key("a", 7, b"\x02")]), "its byte is 2", ""),
    "list of lists": (GGUFBytes(keys=[array_key("a", 9, 1, bytes(12))]), "list of lists", ""),
    "item type": (GGUFBytes(keys=[array_key("a", 77, 1, bytes(12))]), "items of type 77", ""),
    "long list": (
        GGUFBytes(keys=[array_key("a", 4, 1 << 61, bytes(8))]),
        "a list of 2,305,843,009,213,693,952 numbers in 'a'",
        "",
    ),
    "long list of texts": (GGUFBytes(keys=[array_key("a", 8, 1 << 60, bytes(8))]), "texts in 'a' needs", ""),
    "bad text in list": (
        GGUFBytes(keys=[array_key("a", 8, 2, text("x") + text(b"\xff"))]),
        "text 2 of 2 in 'a' .* UTF-8",
        "",
    ),
    "long text in list": (
        GGUFBytes(keys=[array_key("a", 8, 2, text("x") + struct.pack("<Q", 1 << 40))]),
        "text 2 of 2 in 'a' needs 1,099,511,627,776 bytes",
        "",
    ),
    "list of half-truths": (GGUFBytes(keys=[array_key("a", 7, 2, b"\x01\x05")]), "bytes up to 5", ""),
    "alignment 0": (
        GGUFBytes(keys=[number_key("general.alignment", 0)]),
        "general.alignment is 0, and must be a power of two",
        "",
    ),
    "alignment 48": (GGUFBytes(keys=[number_key("general.alignment", 48)]), "general.alignment is 48", ""),
    "alignment 2^31": (
        GGUFBytes(keys=[number_key("general.alignment", 1 << 31)]),
        "general.alignment is 2147483648",
        "",
    ),
    "alignment text": (GGUFBytes(keys=[key("general.alignment", 8, text("32"))]), "general.alignment is '32'", ""),
    "no tensors": (GGUFBytes(tensors=[]), "holds no tensors", ""),
    "tensor without name": (GGUFBytes(tensors=[tensor("", [8])]), "tensor 1 of 1 has 0 bytes", ""),
    "tensor with long name": (GGUFBytes(tensors=[tensor("n" * 64, [8])]), "has 64 bytes, and must have 1 to 63", ""),
    "tensor twice": (
        GGUFBytes(tensors=[ONE, tensor("a.weight", [8], offset=32)], data=bytes(64)),
        "'a.weight' appears twice",
        "",
    ),
    "no dimensions": (GGUFBytes(tensors=[tensor("w", [8], num_dims=0)]), "'w' has 0 dimensions", ""),
    "5 dimensions": (
        GGUFBytes(tensors=[tensor("w", [1, 1, 1, 1, 8])]),
        "'w' has 5 dimensions, and must have 1 to 4",
        "",
    ),
    "dimension 0": (GGUFBytes(tensors=[tensor("w", [8, 0])]), r"'w' has dimensions \(8, 0\)", ""),
    "huge dimensions": (GGUFBytes(tensors=[tensor("w", [U64_MAX] * 4)]), "'w' .F32, .* ends at byte", "download"),
    "row not in blocks": (
        GGUFBytes(tensors=[tensor("w", [48], 8)]),
        "'w' has rows of 48 weights, and Q8_0 needs a multiple of 32",
        "",
    ),
    "type of integers": (
        GGUFBytes(tensors=[tensor("w", [8], 26)]),
        r"'w' has type 26 \(I32\), and the known types are F32 \(0\)",
        "",
    ),
    "type for activations": (GGUFBytes(tensors=[tensor("w", [256], 15)]), r"type 15 \(Q8_K\)", "quantize"),
    "retired type": (GGUFBytes(tensors=[tensor("w", [256], 4)]), "type 4, and the known types .* Q2_0 .42.", ""),
    "type of a fork": (GGUFBytes(tensors=[tensor("w", [256], 133)]), r"type 133 \(Q6_0\), a type of ik_llama.cpp", ""),
    "unknown type": (GGUFBytes(tensors=[tensor("w", [8], U32_MAX)]), "type 4,294,967,295", ""),
    "offset not aligned": (
        GGUFBytes(tensors=[tensor("w", [2], offset=8)]),
        "offset 8, which is no multiple of the alignment 32",
        "",
    ),
    "offset outside": (
        GGUFBytes(tensors=[tensor("w", [8], offset=1 << 40)]),
        "ends at byte 1,099,511,627,",
        "download",
    ),
    "overlap": (
        GGUFBytes(tensors=[tensor("a", [16]), tensor("b", [8], offset=32)], data=bytes(96)),
        "overlap: 'a' takes bytes 160 to 224, and tensor 'b' starts at 192",
        "",
    ),
    "one byte short": (
        GGUFBytes(tensors=[ONE, tensor("b.weight", [8], offset=32)], data=bytes(63)),
        "'b.weight' .F32, 32 bytes. ends at byte 224, and the file has 223: 1 of 2 tensors are whole, all of "
        "them need 224 bytes",
        "download",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said(tmp_path, case):
    file, message, hint = CASES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(file.build())
    error = refusal(path)
    assert error.message.startswith(f"{path}: ")
    assert re.search(message, error.message), error.message
    assert hint in error.hint


def test_a_header_that_never_ends(tmp_path):
    """In a file of 1 TB (sparse) nearly any count fits into what is left; the header has a bound of its own."""
    path = tmp_path / "huge.gguf"
    path.write_bytes(GGUFBytes(keys=[array_key("a", 8, 1 << 35, b"")]).build())
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    assert "a header may have 134,217,728 in all" in refusal(path).message


def test_control_characters_from_a_file_are_not_printed(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(GGUFBytes(tensors=[tensor("\x1b[31mw\x07", [8], 99)]).build())
    message = refusal(path).message
    assert r"\x1b[31mw\x07" in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("ggml_id", "said", "instead"),
    [
        (64, "IQ1_XS.*Unsloth", "UD-TQ1_0 or IQ1_S"),
        (65, "IQ1_XXS.*Unsloth", "UD-TQ1_0 or IQ1_S"),
        (66, "IQ1_XXXS.*Unsloth", "UD-TQ1_0 or IQ1_S"),
        (142, "PQ2_0.*PrismML.*blocks of 128", "llama.cpp's own Q2_0"),
        (134, r"\(IQ1_BN\), a type of ik_llama.cpp", "kimi-lite pull"),
        (337, r"\(IQ2_K_R4\), a type of ik_llama.cpp with rows interleaved by 4", "kimi-lite quantize FILE.gguf"),
        (229, r"\(IQ1_M with interleaved rows\)", "kimi-lite pull"),
    ],
)
def test_a_type_of_a_fork_is_refused_by_name_with_what_to_get(tmp_path, ggml_id, said, instead):
    path = tmp_path / "fork.gguf"
    path.write_bytes(GGUFBytes(tensors=[tensor("w", [256], ggml_id)]).build())
    error = refusal(path)
    assert re.search(said, error.message) and instead in error.hint


@given(st.integers(24, 4000), st.booleans())
def test_a_header_in_parts_is_the_header(part_bytes, is_damaged):
    """Read from a growing beginning of the file, a header is what it is in the whole file, errors too."""
    keys = [array_key("a", U32, 300, bytes(1200)), key("b", STRING, text("x" * 900))]
    data = GGUFBytes(keys=keys, tensors=[tensor("w", [8], 4 if is_damaged else 0)]).build()
    whole = _outcome(lambda: read_header(Path("x.gguf"), memoryview(data)))
    size = part_bytes
    while True:
        part = memoryview(data)[:size]
        try:
            found = _outcome(lambda part=part: read_header(Path("x.gguf"), part, len(data)))
        except HeaderGoesOn as more:
            is_more = size < more.num_bytes <= len(data)
            size = max(more.num_bytes, 2 * size)
            if not is_more:
                pytest.fail(f"{more.num_bytes} of {len(data)}")
        else:
            break
    assert found == whole


def _outcome(read):
    try:
        header = read()
    except HeaderGoesOn:
        raise
    except KimiLiteError as error:
        return str(error)
    return header.tensors, {name: str(value) for name, value in header.metadata.items()}
