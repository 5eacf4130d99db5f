"""Tests of the kernels. Importing `native.cpu` first puts the tests' own kernels into the cache that notices every
edit."""

import kimi_lite.native.cpu  # noqa: F401
