"""What one epoch shows of the past: exactly its share, others each time, nobody twice before everybody once."""

from collections import Counter

import pytest

from buffers.experience import Role, beside
from strategies.catalog import Distill, Ewc, Replay, Strategy
from strategies.dataset import Item
from strategies.mix import per_epoch, shown


def rows(role: Role, count: int) -> list[Item]:
    return [Item(index=place, role=role, shape="text", update=1, tokens=[1, 5], start=1) for place in range(count)]


def test_an_epoch_shows_the_ratios_of_what_it_is_made_of() -> None:
    """60 % of new and replayed rows are new; the general tenth is of the whole; what is not there is not counted."""
    items: dict[Role, list[Item]] = {
        "new": rows("new", 60), "replay": rows("replay", 100), "general": rows("general", 30),
    }  # fmt: skip
    strategies: list[Strategy] = [Ewc(), Replay(ratio=0.4, general_ratio=0.1), Distill()]
    assert per_epoch(items, strategies) == {"replay": 40, "general": 11}
    assert per_epoch({**items, "replay": rows("replay", 7)}, strategies) == {"replay": 7, "general": 7}
    assert per_epoch({**items, "general": []}, strategies) == {"replay": 40}
    assert per_epoch(items, [Ewc()]) == {}


@pytest.mark.parametrize("count", [1, 3, 4, 7, 10])
def test_epochs_take_turns(count: int) -> None:
    """Over the epochs every replayed row is seen as often as every other, give or take one; new rows in each."""
    items = [*rows("new", 5), *rows("replay", 10)]
    counts: dict[Role, int] = {"replay": count}
    seen: Counter[Item] = Counter()
    for epoch in range(8):
        epoch_rows = shown(items, counts, seed=3, epoch=epoch)
        assert len(epoch_rows) == 5 + count and epoch_rows[:5] == items[:5]
        seen.update(epoch_rows)
        assert max(seen[item] for item in items[5:]) - min(seen[item] for item in items[5:]) <= 1
    ran = {seed: [shown(items, counts, seed, epoch) for epoch in range(8)] for seed in (3, 4)}
    assert ran[3] == [shown(items, counts, 3, epoch) for epoch in range(8)]
    assert count == 10 or ran[3] != ran[4]


def test_a_role_without_a_count_is_shown_whole() -> None:
    """Rows of a rebase, derived rows, and everything where nothing is replayed."""
    items = [*rows("new", 2), *rows("derived", 4)]
    assert shown(items, {"replay": 1}, seed=0, epoch=5) == items
    assert shown([*items, *rows("replay", 1)], {"replay": 3}, seed=0, epoch=5)[:6] == items


def test_a_share_is_of_both() -> None:
    assert [beside(60, ratio) for ratio in (0.0, 0.25, 0.4)] == [0, 20, 40]
