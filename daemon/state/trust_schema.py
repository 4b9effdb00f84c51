"""Tables by which feedback is believed: an append-only list of migrations, applied by `daemon.state.database`."""

MIGRATIONS: list[tuple[str, str]] = [
    (
        "trust-1",
        """
        ALTER TABLE record ADD COLUMN code TEXT NOT NULL DEFAULT '';
        CREATE TABLE example_band (           -- MinHash bands: examples that share one may be alike
          band INTEGER NOT NULL,
          example_id INTEGER NOT NULL,
          PRIMARY KEY (band, example_id)
        ) WITHOUT ROWID;
        CREATE TABLE waiting_band (           -- the same for records in probation
          band INTEGER NOT NULL,
          model TEXT NOT NULL,
          record_id TEXT NOT NULL,
          PRIMARY KEY (band, model, record_id)
        ) WITHOUT ROWID;
        CREATE INDEX example_source ON example (model, source, ingested_at) WHERE source <> '';
        """,
    ),
]
