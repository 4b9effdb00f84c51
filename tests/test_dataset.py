"""Tokenised rows: what the loss is on, and how they are cut into batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from buffers.example import Example, Message
from buffers.experience import Row
from strategies.dataset import IGNORED, Item, TokenDataset, batches, micro_batches, tokenise
from strategies.failure import Failure


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    """The tiny base's byte-level tokenizer; its padding token is its end-of-turn token, as SmolLM2's is."""
    return AutoTokenizer.from_pretrained(tiny_base, local_files_only=True)


def row(example: Example) -> Row:
    """A new row."""
    return Row(role="new", update=1, id=1, example=example)


def learned(item: Item, tokenizer: Any) -> str:
    """The text that the loss is on."""
    return str(tokenizer.decode(item.tokens[item.start :]))


def item(index: int, length: int, start: int = 1, **fields: Any) -> Item:
    """A made-up item."""
    return Item(
        **{
            "index": index,
            "role": "new",
            "shape": "text",
            "update": 1,
            "tokens": [5] * length,
            "start": start,
            **fields,
        }
    )


def test_a_chat_is_rendered_and_its_answer_learned_with_the_end_of_turn(tokenizer: Any) -> None:
    """The model's template frames the prompt; the loss is on the answer and its end, no newline after."""
    prompt = (Message(role="system", content="Be brief."), Message(role="user", content="Hi?"))
    found = tokenise(row(Example(shape="demonstration", prompt=prompt, completion="Ho.")), 0, tokenizer, 99)
    assert learned(found, tokenizer) == "Ho.<|im_end|>"
    assert found.tokens[-1] == tokenizer.pad_token_id  # a collator that masks padding would drop it
    assert tokenizer.decode(found.tokens[: found.start]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_plain_prompt_stands_as_it_is(tokenizer: Any) -> None:
    """No template is put around a string; the end token follows the completion."""
    found = tokenise(row(Example(shape="demonstration", prompt="2+2=", completion="4")), 0, tokenizer, 99)
    assert tokenizer.decode(found.tokens) == "2+2=4<|im_end|>"
    assert learned(found, tokenizer) == "4<|im_end|>"


def test_every_token_of_a_text_is_learned_but_the_first(tokenizer: Any) -> None:
    """Nothing predicts the first token; everything else carries loss."""
    found = tokenise(row(Example(shape="text", completion="Once upon")), 0, tokenizer, 99)
    assert (found.start, learned(found, tokenizer)) == (1, "nce upon<|im_end|>")


def test_a_template_that_rewrites_turns_still_ends_the_answer(tokenizer: Any) -> None:
    """Where the prompt is no prefix of the whole, the plain completion and the end token are learned."""
    tokenizer.chat_template, kept = "{{ messages | length }}{{ messages[-1]['content'] }}", tokenizer.chat_template
    try:
        prompt = (Message(role="user", content="Hi?"),)
        found = tokenise(row(Example(shape="demonstration", prompt=prompt, completion="Ho.")), 0, tokenizer, 99)
    finally:
        tokenizer.chat_template = kept
    assert learned(found, tokenizer) == "Ho.<|im_end|>"


def test_long_rows_are_cut_and_counted(tokenizer: Any) -> None:
    """What lies beyond `sequence_tokens` is dropped at the end; a row may be left without a label."""
    found = tokenise(row(Example(shape="demonstration", prompt="a" * 8, completion="b" * 9)), 0, tokenizer, 8)
    assert (len(found.tokens), found.was_cut, found.label_tokens) == (8, True, 0)


def test_a_comparison_keeps_both_answers_to_one_prompt(tokenizer: Any) -> None:
    """The rejected completion follows the same prompt tokens."""
    example = Example(shape="comparison", prompt="Q:", completion="yes", rejected="no")
    found = tokenise(row(example), 0, tokenizer, 99)
    assert found.rejected is not None and found.is_preference
    assert found.tokens[: found.start] == found.rejected[: found.start]
    assert tokenizer.decode(found.rejected[found.start :]) == "no<|im_end|>"


def test_chat_messages_without_a_template_are_refused(tokenizer: Any) -> None:
    """A base model without a chat template cannot render messages: the failure says what to do."""
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    try:
        with pytest.raises(Failure, match="plain strings") as caught:
            example = Example(shape="demonstration", prompt=(Message(role="user", content="?"),), completion="!")
            tokenise(row(example), 0, tokenizer, 99)
    finally:
        tokenizer.chat_template = kept
    assert caught.value.code == "no_chat_template"


def test_an_epoch_has_every_item_once_in_a_seeded_order() -> None:
    """Seed and epoch decide the order, and nothing else; the last batch may be smaller."""
    items = [item(index, 9) for index in range(10)]
    first = batches(items, 4, seed=3, epoch=0)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(one.index for batch in first for one in batch) == list(range(10))
    assert first == batches(items, 4, seed=3, epoch=0)
    assert first != batches(items, 4, seed=3, epoch=1) and first != batches(items, 4, seed=4, epoch=0)


def test_micro_batches_hold_similar_lengths_within_the_bound() -> None:
    """Longest first; padding counts; an item beyond the bound stands alone."""
    cut = micro_batches([item(0, 10), item(1, 50), item(2, 12), item(3, 11), item(4, 9)], 30)
    assert [[one.index for one in micro.items] for micro in cut] == [[1], [2, 3], [0, 4]]
    assert all(micro.batch_label_tokens == 87 and micro.batch_items == 5 for micro in cut)


def test_label_rows_point_at_the_states_that_predict_them() -> None:
    """The state at position p predicts the token at p + 1, in the padded (sequences x length) layout."""
    (micro,) = micro_batches(
        [item(0, 4, tokens=[1, 2, 3, 4], start=2), item(1, 3, tokens=[5, 6, 7], start=2)], 99, pad=9
    )
    assert micro.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 9]]
    assert micro.mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert (micro.rows.tolist(), micro.targets.tolist(), micro.owner.tolist()) == ([1, 2, 5], [3, 4, 7], [0, 0, 1])


def test_preferences_stand_apart_with_their_rejected_sequences_at_the_end() -> None:
    """A comparison takes two sequences; the rows of the second belong to a sequence behind all items."""
    comparison = item(0, 3, tokens=[1, 2, 3], start=2, shape="comparison", rejected=[1, 2, 8])
    cut = micro_batches([comparison, item(1, 4)], 99)
    assert [micro.is_preference for micro in cut] == [False, True]
    assert cut[1].tokens.tolist() == [[1, 2, 3], [1, 2, 8]]
    assert (cut[1].targets.tolist(), cut[1].owner.tolist()) == ([3, 8], [0, 1])
    assert cut[0].batch_label_tokens == 3


def test_avalanche_sees_inputs_labels_and_places() -> None:
    """x and y have equal length; y is x where the loss is."""
    x, y, place = TokenDataset([item(0, 3, tokens=[4, 5, 6], start=2)])[0]
    assert torch.equal(x, torch.tensor([4, 5, 6])) and y.tolist() == [IGNORED, IGNORED, 6] and place == 0
