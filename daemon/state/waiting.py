"""What waits to be learned as the schedule must see it: without what a single subject may not give to one update."""

import msgspec

from buffers import claims
from buffers.claims import Pending, Share
from daemon.state.database import Connection
from daemon.trust.policy import Trust, trusted_sources


def share_of(trust: Trust) -> Share:
    """How much of one update a subject may give; sources of the staff are not counted by subject."""
    return Share(trust.subject_share, tuple(trusted_sources(trust)))


def waiting(connection: Connection, model: str, trust: Trust) -> Pending:
    """What one update could take. What it must leave behind has waited since the last run, not since it came.

    Otherwise one busy subject alone would be due again and again, for updates of a single example.
    """
    everything = claims.pending(connection, model)
    allowed = claims.allowed(connection, model, everything.train, share_of(trust))
    if allowed == everything.train or everything.oldest_at is None:
        return everything
    last = connection.execute("SELECT coalesce(max(created_at), 0) FROM run WHERE model = ?", (model,)).fetchone()[0]
    return msgspec.structs.replace(everything, train=allowed, oldest_at=max(everything.oldest_at, float(last)))
