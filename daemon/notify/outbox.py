"""The outbox: one small file per notice and receiver, until it is delivered. Survives every crash of both sides."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from daemon.notify.notices import Notice
from daemon.notify.settings import Notify
from strategies.request import write

RETRY_SECONDS, RETRY_SECONDS_MAX = 10.0, 3600.0


class Target(msgspec.Struct, frozen=True):
    """Somebody who is told. The address may hold a password, so files and logs name only `key`."""

    kind: str
    """`webhook` or `apprise`."""
    address: str

    @property
    def key(self) -> str:
        """A name that tells nothing of the address."""
        return f"{self.kind}-{hashlib.sha256(self.address.encode()).hexdigest()[:12]}"


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """A notice on its way to one target."""

    notice: Notice
    target: str
    """`Target.key`."""
    since: float
    attempts: int = 0
    next_at: float = 0.0
    error: str = ""
    """What went wrong the last time."""


def targets(settings: Notify) -> list[Target]:
    """Everybody to tell. Raises OSError when the file of the Apprise URLs cannot be read."""
    found = webhooks(settings)
    if settings.apprise_file is not None:
        lines = map(str.strip, settings.apprise_file.read_text("utf-8").splitlines())
        found += [Target("apprise", line) for line in lines if line and not line.startswith("#")]
    return found


def webhooks(settings: Notify) -> list[Target]:
    """Those that the configuration itself names."""
    return [Target("webhook", url) for url in settings.webhook_urls]


def put(outbox: Path, notices: Iterable[Notice], keys: Iterable[str], now: float) -> None:
    """Lay notices down for these targets; again with the same notice changes nothing but the waiting time."""
    outbox.mkdir(exist_ok=True)
    everybody = list(keys)
    for notice in notices:
        for key in everybody:
            write(path_of(outbox, notice.id, key), Parcel(notice=notice, target=key, since=now))


def path_of(outbox: Path, notice_id: str, key: str) -> Path:
    """The file of a parcel; model names and events are of letters that a file name may have."""
    return outbox / f"{notice_id}.{key}.json"


def waiting(outbox: Path) -> list[Parcel]:
    """What is not delivered yet, oldest first; what is torn or strange is left out."""
    return [parcel for _, parcel in parcels(outbox)]


def parcels(outbox: Path) -> list[tuple[Path, Parcel]]:
    """Each file with what is in it."""
    found = []
    for path in outbox.glob("[!.]*.json"):
        try:
            found.append((path, msgspec.json.decode(path.read_bytes(), type=Parcel)))
        except (OSError, msgspec.DecodeError):
            continue
    return sorted(found, key=lambda item: item[1].since)


def postponed(parcel: Parcel, error: str, now: float) -> Parcel:
    """After a failed try: ten seconds, doubled each time, an hour at most."""
    pause = min(RETRY_SECONDS * 2.0 ** min(parcel.attempts, 20), RETRY_SECONDS_MAX)
    return msgspec.structs.replace(parcel, attempts=parcel.attempts + 1, next_at=now + pause, error=error)
