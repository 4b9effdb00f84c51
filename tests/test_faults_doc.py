"""The page of faults names tests that exist, and says of every fault how far it is shown."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PAGE = (HERE.parent / "docs" / "faults.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| \d", line)]
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda each: each)
def test_every_test_that_is_named_exists(file: str, name: str) -> None:
    """A test that is renamed or removed takes its line of the page along."""
    assert re.search(rf"^def {name}\(", (HERE / file).read_text("utf-8"), re.MULTILINE)


def test_every_fault_has_a_row_with_a_state() -> None:
    """31 rows in their order; what is called shown or partly shown names its tests, what is open has none."""
    assert [int(row[0]) for row in ROWS] == list(range(1, 32))
    for number, _fault, what_happens, tests, state in ROWS:
        assert state in ("shown", "partly", "open") and what_happens
        assert bool(re.search(r"`test_\w+\.py::test_\w+`", tests)) == (state != "open"), number
        assert re.sub(r"`test_\w+\.py::test_\w+`", "", tests).strip(", ") == "", number
