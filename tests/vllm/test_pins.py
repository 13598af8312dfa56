"""Pages of saves in vLLM's own block pool."""

from __future__ import annotations

from collections import Counter

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import RequestStatus

from integration.vllm.messages import Report
from integration.vllm.saves import PagePins
from tests.vllm.halves import Scheduling, request_of


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


@pytest.mark.usefixtures("hashes")
def test_only_blocks_that_nobody_else_has_come_back_with_a_save() -> None:
    half = Scheduling()
    blocks = half.blocks.get_new_blocks(5)
    one, table = request_of("one", 70), [block.block_id for block in blocks]
    half.admit(one, table)
    half.step({"one": table}, one=70)
    assert half.pages.pinned and not half.frees_blocks  # captured
    one.num_in_flight_tokens = 0
    (save,) = half.step({"one": table}).saves
    assert half.busy and not half.frees_blocks  # the request runs on: its blocks stay its own
    half.finished(one, (table,))
    half.blocks.free_blocks(blocks)
    assert half.frees_blocks
    half.reported(Report(saves=Counter({save.id: 1}), stored=Counter({save.id: 1})))
    assert not half.frees_blocks and not half.busy
    assert half.blocks.get_num_free_blocks() == 63


@pytest.mark.usefixtures("hashes")
def test_blocks_of_a_preempted_request_come_back_with_the_next_step() -> None:
    half = Scheduling()
    blocks = half.blocks.get_new_blocks(5)
    one, table = request_of("one", 70), [block.block_id for block in blocks]
    half.admit(one, table)
    half.step({"one": table}, one=70)
    one.status = RequestStatus.PREEMPTED
    half.blocks.free_blocks(blocks)
    assert half.frees_blocks  # what was captured is dropped, so that nobody else need be preempted
    half.step({})
    assert not half.frees_blocks and half.blocks.get_num_free_blocks() == 63


def test_a_block_in_two_saves_comes_back_with_the_last() -> None:
    pool = BlockPool(num_gpu_blocks=10, enable_caching=True, hash_block_size=32)
    (block,) = pool.get_new_blocks(1)
    pins, pages = PagePins(0.5, pool), [block.block_id]
    saves = []
    for _ in range(2):
        pins.pin(pages)
        saves.append(pins.send(pages, ranks=1))
    assert not pins.frees_blocks
    pool.free_blocks([block])
    assert pins.frees_blocks
    pins.finish(saves[0], ranks=1, stored=1)
    assert pins.frees_blocks and pool.get_num_free_blocks() == 8
    pins.finish(saves[1], ranks=1, stored=1)
    assert not pins.frees_blocks and pool.get_num_free_blocks() == 9
