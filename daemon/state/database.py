"""The database file: opening, migrations, transactions. WAL, `synchronous=FULL`: what a commit returned is on disk."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from buffers import journal
from daemon.state import trust_schema

Connection = sqlite3.Connection
DatabaseError = sqlite3.Error

MIGRATIONS: list[tuple[str, str]] = [
    *journal.MIGRATIONS,
    (
        "state-1",
        """
        CREATE TABLE run (
          id TEXT PRIMARY KEY,                -- MODEL-NNNN[.attempt]
          model TEXT NOT NULL,
          state TEXT NOT NULL,
          trigger TEXT NOT NULL,              -- threshold | max_age | cron | interval | manual
          reason TEXT NOT NULL DEFAULT '',
          update_number INTEGER NOT NULL,
          parent_version INTEGER,
          version INTEGER,
          attempts INTEGER NOT NULL DEFAULT 0,
          pid INTEGER,
          created_at REAL NOT NULL,
          updated_at REAL NOT NULL,
          cut TEXT,                           -- JSON of buffers.experience.Cut
          verdict TEXT                        -- JSON of daemon.gate.Verdict
        );
        CREATE INDEX run_model ON run (model, created_at);
        CREATE INDEX run_state ON run (state);
        CREATE TABLE version (
          model TEXT NOT NULL,
          number INTEGER NOT NULL,
          run_id TEXT NOT NULL,
          parent INTEGER,
          state TEXT NOT NULL,                -- published | live | superseded | rolled_back | removed
          manifest_sha256 TEXT NOT NULL,
          published_at REAL NOT NULL,
          activated_at REAL,
          activation TEXT,                    -- JSON: milliseconds of the swap, fingerprint
          PRIMARY KEY (model, number)
        );
        CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE audit (
          id INTEGER PRIMARY KEY AUTOINCREMENT,
          at REAL NOT NULL,
          actor TEXT NOT NULL,
          event TEXT NOT NULL,
          subject TEXT NOT NULL,
          detail TEXT NOT NULL,
          hash TEXT NOT NULL                  -- SHA-256 over the previous hash and this row: a chain
        );
        """,
    ),
    (
        "state-2",
        """
        CREATE TABLE file (
          path TEXT PRIMARY KEY,              -- below library_directory, surrogate-escaped
          dev INTEGER NOT NULL, ino INTEGER NOT NULL,
          size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
          head_sha256 TEXT NOT NULL DEFAULT '',  -- of the first 4 KiB: tells a rotated file from a grown one
          sha256 TEXT NOT NULL DEFAULT '',    -- of the whole (content files)
          offset INTEGER NOT NULL DEFAULT 0,  -- bytes of complete lines that are in the journal (feedback files)
          tail_sha256 TEXT NOT NULL DEFAULT '',  -- of the 64 bytes before `offset`: the marker of a truncation
          lines INTEGER NOT NULL DEFAULT 0,
          state TEXT NOT NULL,                -- read | partial | refused | quarantined | rotated
          updated_at REAL NOT NULL
        );
        CREATE INDEX file_inode ON file (dev, ino);
        CREATE TABLE record (                 -- feedback records by the producer's id: the first body wins
          model TEXT NOT NULL,
          id TEXT NOT NULL,
          kind TEXT NOT NULL,
          source TEXT NOT NULL,               -- the directory it was dropped in: what it is trusted by
          subject TEXT NOT NULL,
          body_sha256 TEXT NOT NULL,
          body BLOB NOT NULL,                 -- canonical JSON, unknown fields and all
          state TEXT NOT NULL,                -- journal | stored (never trained) | held (for review) | retracted
          reason TEXT NOT NULL DEFAULT '',
          example_id INTEGER,                 -- what became of it in the journal
          pair_id INTEGER,                    -- the comparison that a correction of a shown answer also makes
          ingested_at REAL NOT NULL,
          UNIQUE (model, id)
        );
        CREATE INDEX record_example ON record (example_id) WHERE example_id IS NOT NULL;
        CREATE INDEX record_subject ON record (subject);
        CREATE INDEX record_withdrawn ON record (model, reason) WHERE kind = 'retraction';
        CREATE INDEX record_state ON record (state, model) WHERE state <> 'journal';
        CREATE TABLE quarantine (
          id INTEGER PRIMARY KEY AUTOINCREMENT,
          path TEXT NOT NULL,
          line INTEGER,                       -- NULL: the whole file
          byte_offset INTEGER,
          code TEXT NOT NULL,
          stage TEXT NOT NULL,
          message TEXT NOT NULL,
          sha256 TEXT NOT NULL DEFAULT '',
          stored TEXT,                        -- where the whole file is now, below quarantine/
          excerpt BLOB,                       -- a bad line, at most 64 KiB of it
          retryable INTEGER NOT NULL DEFAULT 0,
          attempts INTEGER NOT NULL DEFAULT 1,
          first_seen REAL NOT NULL,
          UNIQUE (path, line, code, sha256)
        );
        """,
    ),
    (
        "state-3",
        """
        CREATE TABLE document (               -- content files that carry an id: the present version of each
          model TEXT NOT NULL,
          id TEXT NOT NULL,
          path TEXT NOT NULL,
          sha256 TEXT NOT NULL,
          at REAL NOT NULL,
          PRIMARY KEY (model, id)
        );
        CREATE INDEX example_origin ON example (model, origin_file) WHERE subject IS NULL;
        """,
    ),
    (
        "state-4",
        """
        CREATE TABLE tombstone (              -- subjects that were erased: what comes from them is refused
          subject_sha256 TEXT PRIMARY KEY,
          at REAL NOT NULL
        ) WITHOUT ROWID;
        """,
    ),
    (
        "state-5",
        """
        DROP INDEX record_subject;
        CREATE INDEX record_subject ON record (subject, ingested_at);
        """,
    ),
    (
        "state-6",
        """
        CREATE TABLE eval_gram (              -- what stands in eval/, as hashes of runs of words: never trained on
          model TEXT NOT NULL,
          hash INTEGER NOT NULL,
          PRIMARY KEY (model, hash)
        ) WITHOUT ROWID;
        """,
    ),
    (
        "rollout-1",
        """
        CREATE TABLE rollout (                -- versions on their way to all requests, step by step
          id INTEGER PRIMARY KEY AUTOINCREMENT,
          model TEXT NOT NULL,
          version INTEGER NOT NULL,
          stable INTEGER,                     -- what answers the other requests; NULL: the base
          is_first INTEGER NOT NULL,          -- its run is CANARY meanwhile; 0: a version that has served before
          is_held INTEGER NOT NULL,           -- an operator chose the share: nothing is promoted by itself
          settings TEXT NOT NULL,             -- JSON of daemon.rollout.Rollout, as it was at the beginning
          stage INTEGER NOT NULL,
          kind TEXT NOT NULL,                 -- shadow | canary
          percent REAL NOT NULL,
          signals TEXT NOT NULL,              -- JSON of daemon.rollout.Signals, of the present stage
          judgement TEXT,                     -- JSON of daemon.rollout.Judgement, the latest
          began_at REAL NOT NULL,
          stage_began_at REAL NOT NULL,
          record_from INTEGER NOT NULL,       -- feedback records after this row are about the present stage
          ended_at REAL,
          outcome TEXT,                       -- promoted | rolled_back | cancelled
          reason TEXT NOT NULL DEFAULT ''
        );
        CREATE UNIQUE INDEX rollout_open ON rollout (model) WHERE ended_at IS NULL;
        """,
    ),
    *trust_schema.MIGRATIONS,
    (
        "batch-1",
        """
        CREATE TABLE batch_file (             -- files that wait for all of their batch, by the manifest that names them
          path TEXT PRIMARY KEY,
          manifest TEXT NOT NULL,
          since REAL NOT NULL
        ) WITHOUT ROWID;
        CREATE INDEX batch_manifest ON batch_file (manifest);
        """,
    ),
    (
        "consent-1",
        """
        ALTER TABLE record ADD COLUMN consent_until REAL; -- NULL: for ever, or no consent was asked for
        UPDATE record
          SET consent_until = CAST(strftime('%s', json_extract(CAST(body AS TEXT), '$.consent.expires')) AS REAL)
          WHERE instr(body, CAST('"expires"' AS BLOB)) > 0;
        CREATE INDEX record_consent ON record (consent_until) WHERE consent_until IS NOT NULL;
        """,
    ),
    (
        "audit-1",
        """
        CREATE TRIGGER audit_is_never_changed BEFORE UPDATE ON audit
          BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
        CREATE TRIGGER audit_is_never_cut BEFORE DELETE ON audit
          BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
        """,
    ),
]


class NewerDatabase(Exception):
    """The file was written by a newer eternad than this one."""


def open_database(path: Path) -> Connection:
    """Open for writing, migrate, and return a connection for the daemon's single writer thread."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA secure_delete=ON")
    connection.execute("PRAGMA wal_autocheckpoint=1000")
    migrate(connection, path)
    return connection


def open_read_only(path: Path) -> Connection:
    """Open for reading beside a running daemon, or without one; raises `FileNotFoundError` before the first start."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: the daemon has not run with this configuration yet")
    # mode=ro still lets SQLite create the -shm file of the WAL where it may, and reads without it where it may not
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=5)
    connection.execute("PRAGMA query_only=ON")
    return connection


def migrate(connection: Connection, path: Path) -> list[str]:
    """Apply the migrations that are missing, each in a transaction of its own; returns their names."""
    connection.execute("CREATE TABLE IF NOT EXISTS migration (name TEXT PRIMARY KEY, at REAL NOT NULL)")
    missing, newer = missing_migrations(connection)
    if newer:
        raise NewerDatabase(
            f"{path} was written by a newer eternad (migrations {sorted(newer)}): install that one, or restore a backup"
        )
    applied = []
    for name, script in MIGRATIONS:
        if name not in missing:
            continue
        with transaction(connection):
            for statement in _statements(script):
                connection.execute(statement)
            connection.execute("INSERT INTO migration VALUES (?, ?)", (name, time.time()))
        applied.append(name)
    return applied


def missing_migrations(connection: Connection) -> tuple[set[str], set[str]]:
    """What the database still lacks, and what it has that only a newer eternad knows."""
    done = {str(row[0]) for row in connection.execute("SELECT name FROM migration")}
    known = {name for name, _ in MIGRATIONS}
    return known - done, done - known


def _statements(script: str) -> Iterator[str]:
    """`executescript` would commit the transaction that surrounds it, so the script is cut into statements here."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextmanager
def transaction(connection: Connection) -> Iterator[Connection]:
    """All or nothing; readers go on beside it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite may have rolled back already, when the disk is full
            connection.execute("ROLLBACK")
        raise


def setting(connection: Connection, name: str, default: str = "") -> str:
    """A small fact that must survive a restart (`paused`, the last fire of a schedule)."""
    row = connection.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchone()
    return default if row is None else str(row[0])


def set_setting(connection: Connection, name: str, value: str) -> None:
    """Inside the caller's transaction."""
    connection.execute(
        "INSERT INTO setting VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
    )
