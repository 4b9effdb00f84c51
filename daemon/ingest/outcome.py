"""What became of one file: for the service's counters, its log line and the progress display."""

from typing import Literal

import msgspec


class Outcome(msgspec.Struct, kw_only=True):
    """The result of `ingest_file`."""

    path: str
    state: Literal["read", "partial", "unchanged", "moved", "waiting", "quarantined"] = "read"
    """`partial`: more lines wait, call again. `moved`: it changed or went meanwhile; the watcher brings it again.
    `waiting`: its batch is not complete; the watcher brings it again."""
    reason: str = ""
    """Quarantined, waiting: the message."""
    awaited: tuple[str, ...] = ()
    """Waiting: the files of the batch, which need not be looked at for long when they come."""
    model: str = ""
    new: int = 0
    """Examples that the journal did not have."""
    duplicates: int = 0
    heldout: int = 0
    records: int = 0
    """Feedback records stored for the first time, trainable or not."""
    repeated: int = 0
    """Feedback records that were there already, with the same body."""
    held: int = 0
    """Feedback records that wait for review."""
    retracted: int = 0
    """Examples withdrawn."""
    bad_lines: int = 0

    def count(self, other: "Outcome") -> None:
        """Add the numbers of a later batch of the same file."""
        for name in ("new", "duplicates", "heldout", "records", "repeated", "held", "retracted", "bad_lines"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
