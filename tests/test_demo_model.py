"""The demo's model: its paging is right, a right prefix gives the same tokens, a wrong one does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from demo.__main__ import main
from demo.paged_llama import (
    PAGE_TOKENS,
    STEP_TOKENS,
    PagedKV,
    PagedSequence,
    generate,
    make_model,
)
from demo.processes import Child, DemoFailed
from demo.prompts import DOCUMENT, OTHER_DOCUMENT, Chat, Expected

PROMPT = list(DOCUMENT[:600].encode())
ANSWER_TOKENS = 12
PAGES = 96
Computed = tuple[list[int], PagedSequence]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def run(model: Any, prefix: torch.Tensor | None = None) -> Computed:
    """Answer PROMPT on fresh pages that begin with `prefix` (layers, 2, tokens, heads, head size)."""
    kv = PagedKV(PAGES)
    if prefix is not None:
        kv.fresh_sequence(1)  # so that the pages are others than without a prefix
    sequence = kv.fresh_sequence(len(PROMPT) + ANSWER_TOKENS)
    cached_tokens = 0 if prefix is None else prefix.shape[2]
    if prefix is not None:
        for layer, part in zip(kv.layers, prefix, strict=True):
            layer.flatten(1, 2)[:, sequence.slot_mapping(0, cached_tokens)] = part
    return list(generate(model, sequence, PROMPT, cached_tokens, ANSWER_TOKENS)), sequence


@pytest.fixture(scope="module")
def computed(model: Any) -> Computed:
    """The answer without a prefix, and the sequence that holds its KV."""
    return run(model)


def test_paged_attention_gives_the_tokens_of_transformers_own(computed: Computed) -> None:
    stock = make_model(attention="sdpa")
    wanted = stock.generate(
        torch.tensor([PROMPT]), max_new_tokens=ANSWER_TOKENS, do_sample=False, use_cache=True, pad_token_id=0
    )
    assert computed[0] == wanted[0, len(PROMPT) :].tolist()


def test_pages_are_scattered_and_slots_follow_the_page_table() -> None:
    sequence = PagedKV(PAGES).fresh_sequence(PAGE_TOKENS * 20)
    assert sorted(sequence.pages.tolist()) != sequence.pages.tolist()
    assert len(set(sequence.slot_mapping(0, PAGE_TOKENS * 20).tolist())) == PAGE_TOKENS * 20
    token = 3 * PAGE_TOKENS + 5
    assert sequence.slot_mapping(token, token + 1).tolist() == [int(sequence.pages[3]) * PAGE_TOKENS + 5]


@pytest.mark.parametrize("cached_tokens", [STEP_TOKENS, 4 * STEP_TOKENS])
def test_a_prefix_on_other_pages_gives_the_same_tokens_and_the_same_kv(
    model: Any, computed: Computed, cached_tokens: int
) -> None:
    answer, sequence = computed
    wanted = sequence.contents(len(PROMPT))
    again, other = run(model, wanted[:, :, :cached_tokens])
    assert not torch.equal(other.pages, sequence.pages)
    assert again == answer
    assert torch.equal(other.contents(len(PROMPT)), wanted)


@pytest.mark.parametrize("chunk", range(4))
def test_one_wrong_chunk_changes_the_answer(model: Any, computed: Computed, chunk: int) -> None:
    answer, sequence = computed
    prefix = sequence.contents(4 * STEP_TOKENS)
    wrong = (chunk + 1) % 4 * STEP_TOKENS
    prefix[:, :, chunk * STEP_TOKENS : (chunk + 1) * STEP_TOKENS] = prefix[
        :, :, wrong : wrong + STEP_TOKENS
    ].clone()
    assert run(model, prefix)[0] != answer


def test_a_page_that_nobody_wrote_is_an_error(model: Any) -> None:
    sequence = PagedKV(PAGES).fresh_sequence(len(PROMPT) + 1)
    with pytest.raises(FloatingPointError, match="pages were read that nobody wrote"):
        list(generate(model, sequence, PROMPT, STEP_TOKENS, 1))


def test_equal_seeds_give_equal_weights_and_others_do_not(model: Any) -> None:
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in make_model().state_dict().items())
    assert not torch.equal(weights["lm_head.weight"], make_model(seed=1).state_dict()["lm_head.weight"])


def test_one_token_must_be_left_to_compute(model: Any) -> None:
    sequence = PagedKV(PAGES).fresh_sequence(len(PROMPT) + 1)
    with pytest.raises(ValueError, match=f"cached_tokens: got {len(PROMPT)}, wanted 0 to {len(PROMPT) - 1}"):
        next(generate(model, sequence, PROMPT, len(PROMPT), 1))


def test_a_sequence_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens_max: got 17, wanted at most 16"):
        PagedKV(1).fresh_sequence(17)


def test_a_chat_grows_by_what_was_asked_and_answered() -> None:
    chat = Chat(OTHER_DOCUMENT)
    first = chat.ask("How heavy?")
    chat.answered([1, 2, 3])
    second = chat.ask("And in May?")
    assert bytes(first).startswith(OTHER_DOCUMENT.encode())
    assert second[: len(first) + 3] == [*first, 1, 2, 3]


def test_expected_hits_are_whole_chunks_that_leave_a_token() -> None:
    expected = Expected(chunk_tokens=4)
    expected.stored([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert expected.hit_tokens([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == 8
    assert expected.hit_tokens([1, 2, 3, 4, 5, 6, 7, 8]) == 4
    assert expected.hit_tokens([1, 2, 3, 4, 0, 6, 7, 8, 9]) == 4
    assert expected.hit_tokens([0, 2, 3, 4, 5]) == 0


def test_a_process_that_ends_early_fails_the_demo_with_its_log(tmp_path: Path) -> None:
    child = Child("nobody", ["no_such_module_of_the_demo"], tmp_path)
    with pytest.raises(DemoFailed, match="no_such_module_of_the_demo"):
        child.wait_for_log("ready")


def test_a_tier_that_is_not_there_is_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIER", "nowhere")
    assert main() == 2
    assert "nowhere" in capsys.readouterr().out
