"""Dropped files become rows of the journal, exactly once; what is bad goes to the quarantine with its reason."""

from daemon.ingest.outcome import Outcome as Outcome
from daemon.ingest.step import ingest_file as ingest_file
