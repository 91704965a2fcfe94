"""Reading tiles of keys on a CPU: where they lie if they lie side by side, else gathered into scratch.

Tiles come in the dtype of the products and padded to a multiple of `key_multiple` rows; padding rows are 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from openmla.backends.torch.attend import Tile
from openmla.backends.torch.products import Arithmetic
from openmla.backends.torch.rows import read_slots
from openmla.backends.torch.workers import Scratch
from openmla.core.layout import KVLayout

_WASTED_KEYS = 64  # rows in front of a tile and behind it that copying whole pages may add, each


def _padded(keys: int, multiple: int) -> int:
    return -(-keys // multiple) * multiple


class CacheReader:
    """Reads rows of one KV head of a paged cache.

    Args:
        cache: [num_pages, page_size, h_kv, row_elements].
        layout: how a row is stored.
        head: KV head.
        d_v: the first d_v columns of a key are its value.
        arithmetic: says dtype and padding of the tiles.
    """

    def __init__(self, cache: torch.Tensor, layout: KVLayout, head: int, d_v: int, arithmetic: Arithmetic) -> None:
        self._cache, self._layout, self._head, self._d_v = cache, layout, head, d_v
        self._dtype, self._multiple = arithmetic.dtype, arithmetic.key_multiple
        self._page_size = cache.shape[1]
        self._offsets = torch.arange(self._page_size, device="cpu")
        self._rows = None if layout.is_quantised else _flat_rows(cache, head)
        self._pages = None
        if self._rows is not None and self._rows.is_contiguous() and self._rows.numel():
            self._pages = self._rows.view(cache.shape[0], -1)

    def slots(self, slots: torch.Tensor, absent: torch.Tensor | None, scratch: Scratch) -> Tile:
        """The rows at slots [n] int64, all of which exist, or where `absent` [n] is true, may not."""
        keys = slots.shape[0]
        if absent is not None:
            slots = slots.masked_fill(absent, 0)
        if self._cache.shape[0] == 0:
            found = torch.zeros((keys, self._layout.d_qk), dtype=self._dtype, device="cpu")
        elif self._rows is not None and self._rows.dtype == self._dtype:
            tile = scratch.take("tile", self._dtype, _padded(keys, self._multiple), self._layout.d_qk)
            torch.index_select(self._rows, 0, slots, out=tile[:keys])
            return self._finish(tile, keys, absent)
        elif self._rows is not None:
            found = scratch.take("stored", self._rows.dtype, keys, self._layout.d_qk)
            torch.index_select(self._rows, 0, slots, out=found)
        else:
            found = read_slots(self._cache, self._layout, slots, self._head)
        tile = scratch.take("tile", self._dtype, _padded(keys, self._multiple), self._layout.d_qk)
        tile[:keys] = found
        return self._finish(tile, keys, absent)

    def pages(self, pages: torch.Tensor, skip: int, keys: int, scratch: Scratch) -> tuple[Tile, bool]:
        """Keys [skip, skip + keys) of the pages named by int32 `pages`, and whether a page does not exist."""
        listed = pages.tolist()
        num_pages, size = self._cache.shape[0], self._page_size
        bad = min(listed) < 0 or max(listed) >= num_pages
        if not bad and self._rows is not None and self._rows.dtype == self._dtype:
            first = listed[0]
            if (
                keys % self._multiple == 0
                and listed[-1] - first == len(listed) - 1
                and listed == list(range(first, listed[-1] + 1))
            ):
                # A run of pages in a row is one matrix; nothing is copied.
                tile = self._rows[first * size + skip : first * size + skip + keys]
                return Tile(tile, tile[:, : self._d_v], None), False
            if self._pages is not None and len(listed) * size <= keys + 2 * _WASTED_KEYS:
                return self._whole_pages(pages, skip, keys, scratch), False
        wide = pages.long()[:, None]
        slots = (wide * size + self._offsets).view(-1)[skip : skip + keys]
        absent = None
        if bad:
            absent = ((wide < 0) | (wide >= num_pages)).expand(-1, size).reshape(-1)[skip : skip + keys]
        return self.slots(slots, absent, scratch), bad

    def _whole_pages(self, pages: torch.Tensor, skip: int, keys: int, scratch: Scratch) -> Tile:
        """`pages` for pages that exist, copied as wholes: one long copy each instead of one per row."""
        assert self._pages is not None
        total, d_qk = pages.shape[0] * self._page_size, self._layout.d_qk
        room = scratch.take("tile", self._dtype, max(total, skip + _padded(keys, self._multiple)), d_qk)
        torch.index_select(self._pages, 0, pages, out=room[:total].view(pages.shape[0], -1))
        return self._finish(room[skip : skip + _padded(keys, self._multiple)], keys, None)

    def _finish(self, tile: torch.Tensor, keys: int, absent: torch.Tensor | None) -> Tile:
        if tile.shape[0] > keys:
            tile[keys:] = 0
        if absent is not None:
            tile[:keys].masked_fill_(absent[:, None], 0)
        return Tile(tile, tile[:, : self._d_v], absent)


def _flat_rows(cache: torch.Tensor, head: int) -> torch.Tensor | None:
    """Rows [num_pages * page_size, d_qk] of one head as a view, or None where pages are padded."""
    num_pages, page_size, _, d_qk = cache.shape
    page_stride, row_stride, _, _ = cache.stride()
    step = row_stride if page_size > 1 else page_stride
    if page_size > 1 and num_pages > 1 and page_stride != page_size * row_stride:
        return None
    total = num_pages * page_size
    if total <= 1:
        step = d_qk  # the stride of a single row may be anything
    elif step < d_qk:
        return None  # rows overlap
    return cache[:, :, head].as_strided((total, d_qk), (step, 1))


def read_span(k: torch.Tensor, v: torch.Tensor, arithmetic: Arithmetic) -> Callable[[int, int, Scratch], Tile]:
    """Reads keys that lie side by side: k [s_k, d_qk], v [s_k, d_v], rows strided."""
    dtype, multiple = arithmetic.dtype, arithmetic.key_multiple

    def padded(name: str, rows: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        keys = rows.shape[0]
        if rows.dtype == dtype and keys % multiple == 0:
            return rows
        tile = scratch.take(name, dtype, _padded(keys, multiple), rows.shape[1])
        tile[:keys] = rows
        tile[keys:] = 0
        return tile

    def read(first: int, last: int, scratch: Scratch) -> Tile:
        return Tile(padded("tile", k[first:last], scratch), padded("values", v[first:last], scratch), None)

    return read
