"""Pages of saves in vLLM's own block pool."""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockPool

from integration.vllm.saves import PagePins


def test_pages_are_pinned_until_every_rank_is_through() -> None:
    pool = BlockPool(num_gpu_blocks=10, enable_caching=True, hash_block_size=32)
    pages = [block.block_id for block in pool.get_new_blocks(3)]
    free = pool.get_num_free_blocks()
    pins = PagePins(0.5, pool)
    assert pins.room_for(5) and not pins.room_for(6)
    pins.pin(pages)
    assert not pins.room_for(3)
    save = pins.send(pages, ranks=2, note="note")
    pool.free_blocks([pool.blocks[page] for page in pages])  # the request has ended
    assert pool.get_num_free_blocks() == free
    assert pins.finish(save, ranks=1, stored=1) is None and pins.in_flight == 1
    done = pins.finish(save, ranks=1, stored=1)
    assert done is not None and done.stored == 2 and done.note == "note"
    assert pool.get_num_free_blocks() == free + 3
    assert not pins.in_flight and not pins.pinned
    assert pins.finish(save, ranks=1, stored=1) is None  # said twice


def test_nothing_is_pinned_before_the_block_pool_is_known() -> None:
    assert not PagePins(0.5).room_for(1)
