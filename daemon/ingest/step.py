"""One finished file, from its bytes to the journal."""

import re

from daemon.config import Config
from daemon.ingest import batch
from daemon.ingest.content_file import read_content
from daemon.ingest.feedback_file import read_feedback
from daemon.ingest.opened import opened
from daemon.ingest.outcome import Outcome
from daemon.ingest.place import Place, place_of
from daemon.ingest.problem import Moved, Problem
from daemon.ingest.refuse import refuse
from daemon.state.database import Connection
from daemon.state.files import Finished

_FEEDBACK_NAME = re.compile(r".+\.jsonl(?:\.\d+)?", re.DOTALL)


def ingest_file(connection: Connection, config: Config, finished: Finished, now: float) -> Outcome:
    """Take in one finished file: rows, file row, record ids, bad lines and audit row become durable together.

    A file that cannot be read is an outcome, not an exception; what is raised (a full disk, a broken database) is for
    the daemon to see, and nothing of the file counts then.
    """
    try:
        return _read(connection, config, finished, now)
    except Moved:
        return Outcome(path=finished.path, state="moved")
    except Problem as problem:
        is_content = finished.path.startswith(("content/", "eval/"))
        return refuse(connection, config, finished, problem, now, is_content=is_content)


def _read(connection: Connection, config: Config, finished: Finished, now: float) -> Outcome:
    if finished.problem:
        raise Problem(finished.problem, _PROBLEMS[finished.problem], stage="watch")
    place = place_of(finished.path, config.models)
    with opened(config.library_directory, finished) as descriptor:
        if place.area != "feedback":
            if place.name.endswith(batch.SUFFIX):
                return batch.read_batch(connection, config, finished, descriptor, now)
            named = batch.read_named(connection, config, finished, now)
            return named or read_content(connection, config, finished, place, descriptor, now)
        _check_feedback_name(finished.path, place)
        return read_feedback(connection, config, finished, place, descriptor, now)


def _check_feedback_name(path: str, place: Place) -> None:
    if not _FEEDBACK_NAME.fullmatch(place.name):
        message = f"{path}: feedback is read from `.jsonl` files (rotated: `.jsonl.1`), one record per line"
        raise Problem("unknown_format", message, stage="place")


_PROBLEMS = {
    "not_a_file": "a link, a pipe, a socket or a device: only regular files are read; drop a copy of the file itself",
    "never_stable": "the file kept changing for watch.never_stable_seconds; write it under a name that begins with a"
    " dot and rename it when it is complete",
}
