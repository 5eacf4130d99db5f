"""Triton's interpreter with a multiply-add that rounds once, as every GPU's does: its own is a product and a sum."""

from triton.runtime import interpreter

from tests.native import exact


def fuse() -> None:
    """For the rest of the process."""

    def create_fma(builder, x, y, z):
        return interpreter.TensorHandle(exact.fma(x.data, y.data, z.data), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma
