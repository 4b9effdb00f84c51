"""Consent that runs out: from then on nothing of the record is trained on, tested or rehearsed, as if withdrawn.

Its text stays in the database like that of a withdrawn record; `eternad erase` takes a subject's texts away.
"""

from daemon.state import audit, records
from daemon.state.database import Connection, transaction


def expire(connection: Connection, now: float) -> int:
    """Withdraw what may be learned from no longer; how many records."""
    due = records.expired(connection, now)
    if not due:
        return 0
    with transaction(connection):
        withdrawn = sum(records.retract(connection, row, "its consent has run out") for row in due)
        audit.write(connection, "consent.expired", "records", {"records": len(due), "examples": withdrawn})
    return len(due)
