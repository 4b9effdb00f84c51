"""Questions that an operator asks of the database: how much is quarantined, what is paused, what became of a file."""

from typing import Any

from daemon.state.database import Connection


def quarantine_counts(connection: Connection) -> dict[tuple[str, str], int]:
    """How many entries there are, by model (the path's second part, empty if it has none) and code."""
    counted: dict[tuple[str, str], int] = {}
    for path, code, number in connection.execute("SELECT path, code, count(*) FROM quarantine GROUP BY 1, 2"):
        key = (model_of(str(path)), str(code))
        counted[key] = counted.get(key, 0) + int(number)
    return counted


def model_of(path: str) -> str:
    """The model that a path below the library belongs to: `content/npc/a.txt` -> `npc`."""
    parts = path.split("/")
    return parts[1] if len(parts) > 2 else ""


def file_counts(connection: Connection) -> dict[str, int]:
    """Dropped files by state (`read`, `partial`, `quarantined`)."""
    rows = connection.execute("SELECT state, count(*) FROM file GROUP BY 1")
    return {str(state): int(number) for state, number in rows}


def run_counts(connection: Connection) -> dict[tuple[str, str], int]:
    """Runs by model and state."""
    rows = connection.execute("SELECT model, state, count(*) FROM run GROUP BY 1, 2")
    return {(str(model), str(state)): int(number) for model, state, number in rows}


def examples_of_file(connection: Connection, path: str) -> list[dict[str, Any]]:
    """What became of a file's examples: how many, by model, split, state and run."""
    rows = connection.execute(
        "SELECT model, split, state, run_id, count(*) FROM example WHERE origin_file = ? GROUP BY 1, 2, 3, 4", (path,)
    )
    return [dict(zip(("model", "split", "state", "run_id", "examples"), row, strict=True)) for row in rows]


def paused(connection: Connection) -> set[str]:
    """The models that start no update until `resume`; the empty name stands for all of them."""
    rows = connection.execute("SELECT name FROM setting WHERE name LIKE 'paused/%' AND value = '1'")
    return {str(row[0]).removeprefix("paused/") for row in rows}


def example_counts(connection: Connection, model: str) -> dict[str, int]:
    """`{"train/consumed": 12, ...}` like `journal.counts`, in the time of what is *not* consumed.

    Of a million examples nearly all are consumed: they are what is left of the running totals.
    """
    rows = connection.execute(
        "SELECT split, state, count(*) FROM example WHERE model = ?"
        " AND state IN ('pending', 'claimed', 'rejected', 'retracted') GROUP BY 1, 2",
        (model,),
    ).fetchall()
    found = {f"{split}/{state}": int(number) for split, state, number in rows}
    totals = connection.execute("SELECT distinct_examples, heldout FROM intake WHERE model = ?", (model,)).fetchone()
    distinct, heldout = (0, 0) if totals is None else (int(totals[0]), int(totals[1]))
    for split, total in (("heldout", heldout), ("train", distinct - heldout)):
        if consumed := total - sum(number for key, number in found.items() if key.startswith(f"{split}/")):
            found[f"{split}/consumed"] = consumed
    return dict(sorted(found.items()))


def duplicates(connection: Connection, model: str) -> int:
    """Copies of known examples that came in for a model."""
    row = connection.execute("SELECT duplicates FROM intake WHERE model = ?", (model,)).fetchone()
    return 0 if row is None else int(row[0])


def audit_rows(connection: Connection) -> int:
    """How long the audit log is: its ids have no gaps."""
    return int(connection.execute("SELECT coalesce(max(id), 0) FROM audit").fetchone()[0])
