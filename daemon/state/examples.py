"""Examples as they lie in the journal, for whoever exports them."""

from collections.abc import Iterator

from buffers.example import Example, parse
from daemon.state.database import Connection


def of_model(connection: Connection, model: str) -> Iterator[Example]:
    """What counts (not withdrawn, not rejected) of one model, oldest first."""
    found = connection.execute(
        "SELECT body FROM example WHERE model = ? AND state NOT IN ('retracted', 'rejected') ORDER BY id", (model,)
    )
    for (body,) in found:
        yield parse(body)
