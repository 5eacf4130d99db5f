"""What reading a damaged .npz file can raise: numpy, zipfile and zlib each have errors of their own."""

import zipfile
import zlib

DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    SyntaxError,  # numpy's headers are Python literals
    MemoryError,  # a shape that cannot be
    RuntimeError,  # an encrypted entry
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
