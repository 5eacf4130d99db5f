"""The numbers themselves."""

from kimi_lite.native.types.layout import Layout

F32 = Layout("F32", 0, 1, (("x", "<f4"),), product="float", group=1, encoder="floats")
F16 = Layout("F16", 1, 1, (("x", "<f2"),), product="float", group=1, encoder="floats")
BF16 = Layout("BF16", 30, 1, (("x", "<u2"),), product="float", group=1, encoder="floats")

LAYOUTS = (
    F32,
    F16,
    BF16,
)
