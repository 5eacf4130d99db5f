"""What config.json says about how a checkpoint's weights are quantized: `quantization_config` of block FP8, of
compressed-tensors, and of Humming, in which GSQ's 2-bit releases are published.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kimi_lite.arch.checkpoint import CheckpointConfig, inner_object
from kimi_lite.arch.reader import shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.source.shards import RawTensor
from kimi_lite.quantize.source.stored import CodeFormat

_FP8_BLOCK = (128, 128)
_READ = "Read are: none, block FP8, pack-quantized symmetric integers of 2 to 8 bits, and Humming's unsigned integers."
_UINT = re.compile(r"uint([2-8])")
_REGEX_SIGNS = set(".^$*+?()[]{}|")


@dataclass(frozen=True, slots=True)
class Formats:
    """The FP8 block's rows and columns, and the codes of quantized matrices: `by_prefix` of a matrix by its name in the
    files without ".weight", `by_pattern` by a regular expression; `codes` of all others."""

    fp8_block: tuple[int, int] = _FP8_BLOCK
    codes: CodeFormat | None = None
    by_prefix: Mapping[str, CodeFormat] = field(default_factory=dict)
    by_pattern: tuple[tuple[re.Pattern, CodeFormat], ...] = ()

    def of(self, name: str, raw: Mapping[str, RawTensor]) -> CodeFormat | None:
        """Of the weight `name`, one of the canonical names that `raw` has."""
        stored = raw.get(name) or raw.get(f"{name}_packed")
        if stored is None or not (self.by_prefix or self.by_pattern):
            return self.codes
        prefix = re.sub(r"\.weight(_packed)?$", "", stored.name)
        if prefix in self.by_prefix:
            return self.by_prefix[prefix]
        return next((codes for pattern, codes in self.by_pattern if pattern.match(prefix)), self.codes)


def read_formats(config: CheckpointConfig) -> Formats:
    """Raises KimiLiteError for a way of quantizing that is not read here."""
    quantization = config.object("quantization_config")
    if not quantization:
        return Formats()
    source = f"{config.file}, quantization_config"
    method = quantization.get("quant_method")
    if method == "fp8":
        return Formats(_fp8_block(quantization, config))
    groups = inner_object(quantization, "config_groups", source)
    weights = [inner_object(inner_object(groups, name, source), "weights", source) for name in groups]
    if method == "compressed-tensors" and quantization.get("format") == "pack-quantized":
        found = {_packed_format(each) for each in weights}
        if len(found) == 1 and None not in found:
            return Formats(codes=found.pop())
    if method == "humming":
        found = {_humming_format(each) for each in (weights or [quantization])}
        if len(found) == 1 and None not in found:
            return _with_exceptions(found.pop(), inner_object(quantization, "dynamic", source), source)
    have = f"quant_method {shown(method)}, format {shown(quantization.get('format'))}"
    kinds = ", ".join(sorted({str(each.get("dtype") or each.get("num_bits")) for each in weights}))
    raise KimiLiteError(f"The checkpoint is quantized by {have}{kinds and f' ({shown(kinds)})'}.", _READ)


def _fp8_block(quantization: Mapping, config: CheckpointConfig) -> tuple[int, int]:
    block = quantization.get("weight_block_size") or _FP8_BLOCK
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block):
        raise KimiLiteError(
            f"{config.file}: weight_block_size is {shown(block)}, and must be two whole numbers above 0.",
            "Download config.json again.",
        )
    return block[0], block[1]


def _packed_format(weights: Mapping) -> CodeFormat | None:
    """compressed-tensors' fields; None for what is not symmetric integers."""
    bits = weights.get("num_bits")
    is_read = type(bits) is int and 2 <= bits <= 8 and weights.get("type") == "int" and weights.get("symmetric", True)
    return CodeFormat(bits, _group(weights.get("group_size"))) if is_read else None


def _humming_format(fields: Mapping) -> CodeFormat | None:
    """Humming's fields, under either of the names that it has for them; None for other types than unsigned integers,
    and for zero points that are themselves packed."""
    match = _UINT.fullmatch(str(fields.get("dtype") or fields.get("b_dtype")))
    if match is None or (fields.get("has_zero_point") and fields.get("is_fp_zero_point") is False):
        return None
    return CodeFormat(int(match[1]), _group(fields.get("group_size") or fields.get("weight_scale_group_size")))


def _with_exceptions(codes: CodeFormat, dynamic: Mapping, source: str) -> Formats:
    """`dynamic` maps patterns, mostly a name with its dots escaped, to the fields of a matrix."""
    by_prefix, by_pattern = {}, []
    for pattern, fields in dynamic.items():
        found = _humming_format(fields) if isinstance(fields, dict) else None
        if found is None:
            raise KimiLiteError(f"{source}: dynamic has {shown(pattern)} with {shown(fields)}.", _READ)
        bare = re.sub(r"^[+-]:", "", pattern).removeprefix("^").removesuffix("$")
        if not _REGEX_SIGNS & set(re.sub(r"\\.", "", bare)):
            by_prefix[re.sub(r"\\(.)", r"\1", bare)] = found
            continue
        try:
            by_pattern.append((re.compile(bare + r"\Z"), found))
        except re.error as error:
            raise KimiLiteError(f"{source}: dynamic has the pattern {shown(pattern)}: {error}.", _READ) from error
    return Formats(codes=codes, by_prefix=by_prefix, by_pattern=tuple(by_pattern))


def _group(size: object) -> int | None:
    return size if type(size) is int and size > 0 else None
