"""kimi-lite: Kimi K2.5, a trillion-parameter mixture of experts, at home."""

from kimi_lite.files import cache_folder
from kimi_lite.native.cache import keep_kernels_in

__version__ = "0.1.0"

keep_kernels_in(cache_folder)
