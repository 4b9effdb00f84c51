"""Exported rows are read back as the examples that they came from."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffers import journal
from buffers.example import Example, Message, Origin
from daemon import export
from daemon.ingest.rows import example_of
from daemon.state.database import open_database, transaction

TEXT = st.text(min_size=1, max_size=20).filter(str.strip)
MESSAGES = st.lists(
    st.builds(Message, role=st.sampled_from(["system", "user", "assistant", "tool"]), content=st.text(max_size=9)),
    min_size=1, max_size=3,
).map(tuple)  # fmt: skip
RAW = st.text(max_size=9)


def examples(prompts: st.SearchStrategy[object]) -> st.SearchStrategy[Example]:
    """Examples of every shape that has a prompt."""
    return st.one_of(
        st.builds(Example, shape=st.just("demonstration"), prompt=prompts, completion=TEXT),
        st.builds(Example, shape=st.just("boolean"), prompt=prompts, completion=TEXT, label=st.booleans()),
        st.builds(
            Example, shape=st.just("comparison"), prompt=prompts, completion=TEXT.map("a".__add__),
            rejected=TEXT.map("b".__add__),
        ),
    )  # fmt: skip


@given(examples(MESSAGES) | examples(RAW) | st.builds(Example, shape=st.just("text"), completion=TEXT))
def test_every_example_survives_trls_shapes(example: Example) -> None:
    """SFT, DPO and KTO rows, conversational or raw."""
    assert example_of(export.row(example, "trl")) == example


@given(examples(MESSAGES))
def test_what_openais_shapes_can_express_survives_them(example: Example) -> None:
    """Demonstrations and comparisons; ratings have no shape there."""
    if example.shape == "boolean":
        with pytest.raises(export.CannotExport):
            export.row(example, "openai")
    else:
        assert example_of(export.row(example, "openai")) == example


def test_a_journal_is_exported_without_what_was_withdrawn(tmp_path: Path) -> None:
    """And without what the shape has no words for."""
    database = open_database(tmp_path / "db")
    told = Example(shape="demonstration", prompt=(Message("user", "Who?"),), completion="I.")
    gone = Example(shape="text", completion="Gone.")
    with transaction(database):
        journal.add(
            database, "npc", [(told, Origin(file="a")), (gone, Origin(file="a", record_id="x")),
            (Example(shape="text", completion="Kept."), Origin(file="a"))], heldout_fraction=0,
        )  # fmt: skip
        journal.retract(database, "npc", "x")
    assert [example_of(row) for row in export.rows(database, "npc", "openai")] == [told]
    assert list(export.rows(database, "npc", "trl"))[1] == {"text": "Kept."}
    database.close()
