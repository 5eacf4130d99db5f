"""GGUF files laid out by hand, byte by byte, so that a test can write what no honest writer would."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, value_type: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + payload


def number_key(name: str, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


def array_key(name: str, item_type: int, count: int, payload: bytes) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", item_type, count) + payload)


def tensor(
    name: str | bytes, dims: Sequence[int], ggml_id: int = 0, offset: int = 0, num_dims: int | None = None
) -> bytes:
    num_dims = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", num_dims, *dims, ggml_id, offset)


@dataclass
class GGUFBytes:
    """The parts of a file, each open to damage. By default one F32 tensor of 8 weights."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: list[bytes] = field(default_factory=lambda: [key("general.architecture", STRING, text("deepseek2"))])
    tensors: list[bytes] = field(default_factory=lambda: [tensor("a.weight", [8])])
    num_keys: int | None = None
    num_tensors: int | None = None
    data: bytes = bytes(32)
    alignment: int = 32

    def build(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        head = (
            self.magic + struct.pack("<IQQ", self.version, num_tensors, num_keys) + b"".join(self.keys + self.tensors)
        )
        return head + bytes(-len(head) % self.alignment) + self.data
