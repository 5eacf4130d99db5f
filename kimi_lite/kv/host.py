"""Where a page of the cache can be outside the cache: as bytes for a file, and in a second storage in RAM.

A storage is a numpy array or, on a GPU, a torch tensor of shape (layers, pages, 64, row). Both are read and written by
slices; torch is imported only for tensors, so by a process that has it already.
"""

import logging
from collections import OrderedDict
from typing import Any

import numpy as np

_BLOCK_BYTES = 256 << 20  # of pages in RAM
Storage = Any  # a numpy array or a torch tensor: anything with `shape` that is read and written by slices


def read_page(storage: Storage, page: int) -> np.ndarray:
    """A copy of one page: uint8 (layers, 64, row bytes)."""
    content = storage[:, page]
    if isinstance(content, np.ndarray):
        return content.copy().view(np.uint8)
    import torch

    return content.contiguous().cpu().view(torch.uint8).numpy().copy()


def write_page(storage: Storage, page: int, content: np.ndarray) -> None:
    """Put back what `read_page` gave."""
    if isinstance(storage, np.ndarray):
        storage[:, page] = content.view(storage.dtype)
        return
    import torch

    storage[:, page] = torch.from_numpy(content).view(storage.dtype)


def host_bytes(num_pages: int, page_bytes: int) -> int:
    """What so many pages of a GPU's cache take in RAM once all are in use: blocks, each of a size that torch pins
    without rounding it up, and a last one that it rounds up to the next power of two."""
    per_block = _pages_per_block(page_bytes)
    num_blocks, rest = divmod(num_pages, per_block)
    return sum(1 << (n * page_bytes - 1).bit_length() for n in [per_block] * num_blocks + [rest] if n)


def fitting_pages(num_bytes: int, page_bytes: int) -> int:
    """How many pages take at most so many bytes."""
    per_block = _pages_per_block(page_bytes)
    num_blocks, rest_bytes = divmod(num_bytes, host_bytes(per_block, page_bytes))
    rest = (1 << rest_bytes.bit_length() - 1) // page_bytes if rest_bytes else 0
    return num_blocks * per_block + rest


def _pages_per_block(page_bytes: int) -> int:
    return max(1, _BLOCK_BYTES // page_bytes)


class HostPages:
    """Memory in RAM for pages that had to leave the cache's own storage; the least recently left is forgotten first.

    `put` when a page leaves the cache, `withdraw` and `bring_back` when it is wanted again. Memory comes in blocks,
    when the first page comes that needs one: pinning takes time, and torch rounds what it pins up to powers of two,
    which would be 4 GiB for 2.3.
    """

    def __init__(self, num_pages: int, storage: Storage) -> None:
        """`storage`: the cache's own; these pages have its kind. Those of a GPU come to lie in pinned memory."""
        assert num_pages > 0, num_pages
        num_layers, _, num_rows, length = storage.shape
        self.num_pages = num_pages
        self._shape = (num_layers, num_rows, length)  # of a page, in one piece
        self._per_block = _pages_per_block(num_layers * num_rows * length * storage.dtype.itemsize)
        self._blocks: dict[int, Storage] = {}  # (pages, *a page's shape)
        self._place_of: OrderedDict[bytes, int] = OrderedDict()  # by the page's hash, least recently put first
        self._free = list(range(num_pages - 1, -1, -1))  # low numbers go first

    def __contains__(self, page_hash: bytes) -> bool:
        return page_hash in self._place_of

    def __len__(self) -> int:
        return len(self._place_of)

    def put(self, page_hash: bytes, storage: Storage, page: int) -> bool:
        """Keep what the page holds; False when the only places are just being withdrawn."""
        if page_hash in self._place_of:  # it was computed again while it lay here
            self._place_of.move_to_end(page_hash)
            return True
        if not self._free and self._place_of:
            self._free.append(self._place_of.popitem(last=False)[1])
        if not self._free:
            return False
        place = self._free.pop()
        number = place // self._per_block
        if number not in self._blocks:
            count = min(self._per_block, self.num_pages - number * self._per_block)
            self._blocks[number] = _like_in_ram((count, *self._shape), storage)
        self.page(place)[:] = storage[:, page]
        self._place_of[page_hash] = place
        return True

    def page(self, place: int) -> Storage:
        """(layers, rows, length): what lies at a place that has been put to."""
        return self._blocks[place // self._per_block][place % self._per_block]

    def withdraw(self, page_hash: bytes) -> int:
        """The place of a page, no longer to be found and not given to another until `bring_back`."""
        return self._place_of.pop(page_hash)

    def bring_back(self, place: int, storage: Storage, page: int) -> None:
        """Copy what lies at a withdrawn place into a page, and free it."""
        storage[:, page] = self.page(place)
        self._free.append(place)


def _like_in_ram(shape: tuple[int, ...], storage: Storage) -> Storage:
    """An array like `storage`, or a tensor that its GPU reads at full speed where the system allows that."""
    if isinstance(storage, np.ndarray):
        return np.zeros(shape, storage.dtype)
    import torch

    try:
        return torch.empty(shape, dtype=storage.dtype, pin_memory=storage.device.type == "cuda")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        logging.getLogger(__name__).warning(
            "Pages of the cache in RAM are not pinned (%s); they return at half the speed.", reason
        )
        return torch.empty(shape, dtype=storage.dtype)
