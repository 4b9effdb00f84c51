"""Who says nearly the same, in the journal and among what waits: for counting once, and for the hold-out."""

from buffers.example import Example
from daemon.state import likeness as bands
from daemon.state.database import Connection
from daemon.state.likeness import Stored, Waiting
from daemon.trust.likeness import bands as bands_of
from daemon.trust.likeness import likeness, said

SAME = 0.95
"""A training example and a held-out one that are more alike than this are one and the same to an evaluation."""


class Kin:
    """Finds examples by likeness inside the caller's transaction; keeps the keys of the last text."""

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self.model = connection, model
        self._text, self._keys = "", list[int]()

    def keys(self, text: str) -> list[int]:
        """The bands of a text as `said` gives it."""
        if text != self._text or not self._keys:
            self._text, self._keys = text, bands_of(self.model, text)
        return self._keys

    def side(self, example: Example) -> str | None:
        """On which side of the hold-out an example stands that is the same to an evaluation; None without one."""
        text = said(example)
        found = self._stored(text, SAME)
        return next((each.split for each in found if each.split != "eval"), None)

    def note(self, example: Example, example_id: int) -> None:
        """The journal has stored this one."""
        bands.note(self._connection, self.keys(said(example)), example_id)

    def told(self, example: Example, least: float) -> Stored | None:
        """A stored example that teaches the same by an answer that is alike but not equal; None without one."""
        alike = self._stored(said(example), least)
        if any(each.example == example for each in alike):
            return None  # the journal counts its copies itself
        return next((each for each in alike if teaches(each.example) == teaches(example)), None)

    def waiting(self, example: Example) -> list[Waiting]:
        """Candidates among the records in probation; whoever reads their bodies compares them."""
        return bands.waiting(self._connection, self.keys(said(example)), self.model)

    def wait(self, example: Example, record_id: str) -> None:
        """This record waits in probation."""
        bands.wait(self._connection, self.keys(said(example)), self.model, record_id)

    def _stored(self, text: str, least: float) -> list[Stored]:
        found = bands.stored(self._connection, self.keys(text))
        return [each for each in found if likeness(text, said(each.example)) >= least]


def teaches(example: Example) -> tuple[str, bool | None]:
    """Examples of another kind, or with the opposite label, teach something else."""
    return example.shape, example.label
