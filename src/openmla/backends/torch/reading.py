"""Reading tiles of keys on a CPU: where they lie if they lie side by side, else gathered into scratch.

Tiles come in the dtype of the products and padded to a multiple of `key_multiple` rows; padding rows are 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from openmla.backends.torch import dequant
from openmla.backends.torch.attend import Tile
from openmla.backends.torch.products import Arithmetic
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
        self._rows = None if layout.is_quantised else _flat_rows(cache, head)
        self._pages = None  # [num_pages, elements of a page]
        if layout.is_quantised:
            self._pages = _page_bytes(cache, layout)
        elif self._rows is not None and self._rows.is_contiguous() and self._rows.numel():
            self._pages = self._rows.view(cache.shape[0], -1)

    def slots(self, slots: torch.Tensor, absent: torch.Tensor | None, scratch: Scratch) -> Tile:
        """The rows at slots [n] int64, all of which exist, or where `absent` [n] is true, may not."""
        keys = slots.shape[0]
        if absent is not None:
            slots = slots.masked_fill(absent, 0)
        tile = scratch.take("tile", self._dtype, _padded(keys, self._multiple), self._layout.d_qk)
        if self._cache.shape[0] == 0:
            tile.zero_()
        elif self._layout.is_quantised:
            self._dequantise_slots(slots, tile[:keys], scratch)
        elif self._rows is None:
            tile[:keys] = self._cache[slots // self._page_size, slots % self._page_size, self._head]
        elif self._rows.dtype == self._dtype:
            torch.index_select(self._rows, 0, slots, out=tile[:keys])
        else:
            stored = scratch.take("stored", self._rows.dtype, keys, self._layout.d_qk)
            tile[:keys] = torch.index_select(self._rows, 0, slots, out=stored)
        return self._finish(tile, keys, absent)

    def pages(self, pages: torch.Tensor, skip: int, keys: int, scratch: Scratch) -> tuple[Tile, bool]:
        """Keys [skip, skip + keys) of the pages named by int32 `pages`, and whether a page does not exist."""
        listed = pages.tolist()
        num_pages, size, first = self._cache.shape[0], self._page_size, listed[0]
        bad = min(listed) < 0 or max(listed) >= num_pages
        if not bad:
            in_place = self._rows is not None and self._rows.dtype == self._dtype and keys % self._multiple == 0
            if in_place and listed == list(range(first, first + len(listed))):
                # A run of pages in a row is one matrix; nothing is copied.
                assert self._rows is not None
                tile = self._rows[first * size + skip : first * size + skip + keys]
                if self._lies_like_scratch(tile):
                    return Tile(tile, tile[:, : self._d_v], None), False
            if self._pages is not None and len(listed) * size <= keys + 2 * _WASTED_KEYS:
                return self._whole_pages(pages, skip, keys, scratch), False
        position = torch.arange(skip, skip + keys, device="cpu")
        named = pages.long()[position // size]
        absent = (named < 0) | (named >= num_pages) if bad else None
        return self.slots(named * size + position % size, absent, scratch), bad

    @staticmethod
    def _lies_like_scratch(tile: torch.Tensor) -> bool:
        """May products see it in place of a copy? fp32 products may add in another order where memory lies otherwise."""
        return tile.dtype == torch.bfloat16 or (tile.is_contiguous() and tile.data_ptr() % 64 == 0)

    def _whole_pages(self, pages: torch.Tensor, skip: int, keys: int, scratch: Scratch) -> Tile:
        """`pages` for pages that exist, copied as wholes: one long copy each instead of one per row."""
        assert self._pages is not None
        count, d_qk = pages.shape[0], self._layout.d_qk
        total, end = count * self._page_size, skip + _padded(keys, self._multiple)
        room = scratch.take("tile", self._dtype, max(total, end), d_qk)
        if self._pages.dtype == self._dtype:
            torch.index_select(self._pages, 0, pages, out=room[:total].view(count, -1))
        else:
            stored = scratch.take("stored", self._pages.dtype, count, self._pages.shape[1])
            torch.index_select(self._pages, 0, pages, out=stored)
            if self._layout.is_quantised:
                parts = dequant.split_pages(stored, self._layout, self._page_size)
                dequant.dequantise(*parts, self._layout, room[:total], scratch)
            else:
                room[:total] = stored.view(total, d_qk)
        return self._finish(room[skip:end], keys, None)

    def _dequantise_slots(self, slots: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        assert self._pages is not None
        layout, page, offset = self._layout, slots // self._page_size, slots % self._page_size
        if layout.scales_behind_page:
            codes, scales, rope = dequant.split_pages(self._pages, layout, self._page_size)
            dequant.dequantise(
                codes[page, offset], scales[page, offset], rope[page, offset], layout, out, scratch
            )  # fmt: skip
        else:
            rows = self._pages.unflatten(1, (self._page_size, layout.bytes_per_token))[page, offset]
            dequant.dequantise(*dequant.split_rows(rows, layout), layout, out, scratch)

    def _finish(self, tile: torch.Tensor, keys: int, absent: torch.Tensor | None) -> Tile:
        if tile.shape[0] > keys:
            tile[keys:] = 0
        if absent is not None:
            tile[:keys].masked_fill_(absent[:, None], 0)
        return Tile(tile, tile[:, : self._d_v], absent)


def _page_bytes(cache: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """The bytes of every page, uint8 [num_pages, page_size * bytes_per_token], a view."""
    size = cache.shape[1] * layout.bytes_per_token
    # The stride of a single page may be anything.
    stride = cache.stride(0) if cache.shape[0] > 1 else size
    return cache.view(torch.uint8).as_strided((cache.shape[0], size), (stride, 1))


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
