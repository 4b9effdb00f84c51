"""Dropped files become rows of the journal, exactly once; what is bad goes to the quarantine with its reason."""

from daemon.ingest.consent import expire as expire
from daemon.ingest.outcome import Outcome as Outcome
from daemon.ingest.retry import CannotRetry as CannotRetry
from daemon.ingest.retry import drop as drop
from daemon.ingest.retry import retry as retry
from daemon.ingest.retry import retry_all as retry_all
from daemon.ingest.step import ingest_file as ingest_file
