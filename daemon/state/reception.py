"""How the answers of each version were received, out of the latest feedback records."""

import msgspec

from daemon.state.database import Connection

RECORDS = 5000
"""A page looks at so many of the latest; a journal of millions is no page."""


class Reception(msgspec.Struct, frozen=True):
    """Feedback of one kind and metric on the answers of one version."""

    version: str
    """As the records name it (`inference.adapter`); empty: they do not say."""
    kind: str
    metric: str
    records: int
    mean: float | None
    """Of `boolean` the share of true, of `float` the mean; None for the others."""


def by_version(connection: Connection, model: str, records: int = RECORDS) -> list[Reception]:
    """Of the latest `records`, newest version first; retracted and refused ones do not count."""
    rows = connection.execute(
        """
        WITH latest AS (
          SELECT kind, CAST(body AS TEXT) AS body FROM record
          WHERE model = ? AND state NOT IN ('retracted', 'rejected') AND kind <> 'retraction'
          ORDER BY rowid DESC LIMIT ?)
        SELECT coalesce(json_extract(body, '$.inference.adapter'), '') AS version, kind,
          coalesce(json_extract(body, '$.metric'), '') AS metric, count(*),
          avg(CASE WHEN kind IN ('boolean', 'float') THEN json_extract(body, '$.value') END)
        FROM latest GROUP BY 1, 2, 3 ORDER BY 1 DESC, 2, 3
        """,
        (model, records),
    )
    return [
        Reception(str(version), str(kind), str(metric), int(number), mean)
        for version, kind, metric, number, mean in rows
    ]
