"""Who says nearly the same, in the journal and among what waits: for counting once, and for the hold-out."""

from collections.abc import Iterable, Iterator, Set

import msgspec

from buffers.example import Example
from daemon.state import likeness as bands
from daemon.state.database import Connection
from daemon.state.likeness import COMPARED_MAX, SUPPORTERS_MAX, Stored, Waiting
from daemon.trust import likeness

SAME = 0.95
"""A training example and a held-out one that are more alike than this are one and the same to an evaluation."""
TEXTS_MAX = 4096
"""So many texts are kept in memory, with what is near them."""
RUNS_CHARACTERS_MAX = 200_000
"""Of so many characters the runs are kept as well, some 100 bytes for each; those of further texts are made twice."""


class Text(msgspec.Struct, eq=False, gc=False):
    """What an example makes a model say, ready to be compared."""

    said: str
    runs: Set[str] | None = None
    """As far as they are kept."""
    keys: list[int] = []
    """Its bands; none yet for what is only compared with."""

    def likeness(self, other: "Text") -> float:
        """Jaccard similarity, 0 to 1."""
        if self.said == other.said:
            return 1.0
        return likeness.overlap(self.runs or likeness.runs(self.said), other.runs or likeness.runs(other.said))


class Kin:
    """Finds examples by likeness inside one transaction, whose end its caller says with `flush`.

    What is near is looked up for many examples at once (`expect`) and kept, so nobody else may change it meanwhile.
    """

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self.model = connection, model
        self._texts: dict[str, Text] = {}
        self._of: dict[int, tuple[Example, Text]] = {}
        """By the identity of an example; the example is held, so that nothing else gets its identity."""
        self._characters = 0
        self._near: dict[int, list[int]] = {}
        """Examples by band, newest first."""
        self._stored: dict[int, tuple[Stored, Text] | None] = {}
        self._near_waiting: dict[int, list[str]] = {}
        self._waiting: dict[str, Waiting | None] = {}
        self._noted: list[tuple[int, int]] = []
        self._waits: list[tuple[int, str]] = []

    def expect(self, examples: Iterable[Example]) -> None:
        """Look up at once what is near these."""
        if len(self._texts) > TEXTS_MAX:
            self._forget()
        texts = [self.text(each) for each in examples]
        missing = {key for text in texts for key in text.keys if key not in self._near}
        if missing:
            self._near |= bands.near(self._connection, missing)
            self._read([each for text in texts for each in self._candidates(text)])

    def expect_waiting(self, examples: Iterable[Example]) -> None:
        """The same among the records in probation."""
        missing = {key for each in examples for key in self.text(each).keys if key not in self._near_waiting}
        if missing:
            self._near_waiting |= bands.near_waiting(self._connection, self.model, missing)

    def text(self, example: Example) -> Text:
        """What an example says, with its bands."""
        text = self._text(example)
        if not text.keys:
            text.keys = likeness.keys(self.model, text.runs or likeness.runs(text.said))
        return text

    def likeness(self, one: Example, other: Example) -> float:
        """Jaccard similarity of what they say, 0 to 1."""
        return self._text(one).likeness(self._text(other))

    def _text(self, example: Example) -> Text:
        known = self._of.get(id(example))
        if known is None:
            said = likeness.said(example)
            if said not in self._texts:
                self._characters += len(said)
                keeps = self._characters <= RUNS_CHARACTERS_MAX
                self._texts[said] = Text(said, likeness.runs(said) if keeps else None)
            known = self._of[id(example)] = example, self._texts[said]
        return known[1]

    def side(self, example: Example) -> str | None:
        """On which side of the hold-out an example stands that is the same to an evaluation; None without one."""
        return next((each.split for each in self._alike(example, SAME) if each.split != "eval"), None)

    def note(self, example: Example, example_id: int, split: str) -> None:
        """The journal has stored this one."""
        text = self.text(example)
        if text.keys[0] not in self._near:
            self.expect([example])
        self._stored[example_id] = Stored(example_id, split, example), text
        for key in text.keys:
            self._near[key].insert(0, example_id)
            self._noted.append((key, example_id))

    def told(self, example: Example, least: float) -> Stored | None:
        """A stored example that teaches the same by an answer that is alike but not equal; None without one."""
        alike = list(self._alike(example, least))
        if any(each.example == example for each in alike):
            return None  # the journal counts its copies itself
        return next((each for each in alike if teaches(each.example) == teaches(example)), None)

    def waiting(self, example: Example) -> list[Waiting]:
        """Candidates among the records in probation, oldest ids first; whoever reads their bodies compares them."""
        self.expect_waiting([example])
        ids = sorted({identity for key in self.text(example).keys for identity in self._near_waiting[key]})
        ids = ids[:SUPPORTERS_MAX]
        if missing := [each for each in ids if each not in self._waiting]:
            self._waiting |= dict.fromkeys(missing)
            self._waiting |= {each.id: each for each in bands.waiting(self._connection, self.model, missing)}
        return [found for each in ids if (found := self._waiting[each]) is not None]

    def wait(self, example: Example, record_id: str) -> None:
        """This record waits in probation."""
        self._waits += ((key, record_id) for key in self.text(example).keys)

    def flush(self) -> None:
        """Write what was noted, before the transaction ends; in the order of the bands, which is that of the pages."""
        bands.note(self._connection, sorted(self._noted))
        bands.wait(self._connection, self.model, sorted(self._waits))
        self._noted, self._waits = [], []

    def _forget(self) -> None:
        self.flush()
        for kept in (self._texts, self._of, self._near, self._stored, self._near_waiting, self._waiting):
            kept.clear()
        self._characters = 0

    def _alike(self, example: Example, least: float) -> Iterator[Stored]:
        """Stored examples that are alike, newest first."""
        text = self.text(example)
        if text.keys[0] not in self._near:
            self.expect([example])
        candidates = self._candidates(text)
        if candidates:
            self._read(candidates)
        for found in map(self._stored.get, candidates):
            if found is not None and text.likeness(found[1]) >= least:
                yield found[0]

    def _candidates(self, text: Text) -> list[int]:
        near = {each for key in text.keys if (ids := self._near[key]) for each in ids[:COMPARED_MAX]}
        return sorted(near, reverse=True)[:COMPARED_MAX] if near else []

    def _read(self, ids: Iterable[int]) -> None:
        if missing := {each for each in ids if each not in self._stored}:
            self._stored |= dict.fromkeys(missing)
            for each in bands.stored(self._connection, missing):
                self._stored[each.id] = each, self._text(each.example)


def teaches(example: Example) -> tuple[str, bool | None]:
    """Examples of another kind, or with the opposite label, teach something else."""
    return example.shape, example.label
