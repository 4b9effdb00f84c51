"""`python -m daemon.notify.deliver CONFIG`: one round over the outbox, as a child of the daemon."""

import fcntl
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from daemon import config as configuration
from daemon import log as logs
from daemon.config import Config
from daemon.notify.outbox import Parcel, Target, parcels, postponed, targets
from daemon.notify.send import NotDelivered, send
from strategies.request import write

EX_CONFIG = 78

log = logging.getLogger("eternad.notify")


def deliver(config: Config, now: float) -> int:
    """Try what is due; returns how much was delivered. A parcel for a target that is no more is thrown away."""
    outbox, known = outbox_of(config), {target.key: target for target in targets(config.notify)}
    return sum(
        _try(config, path, parcel, known, now)
        for path, parcel in parcels(outbox)
        if not 0 < parcel.next_at - now <= config.notify.give_up_seconds  # further off: the clock was set back
    )


def _try(config: Config, path: Path, parcel: Parcel, known: Mapping[str, Target], now: float) -> bool:
    target = known.get(parcel.target)
    if target is None:
        path.unlink(missing_ok=True)
        return False
    try:
        send(parcel.notice, target, config.notify.webhook_secret_file)
    except NotDelivered as error:
        if error.for_good or now - parcel.since > config.notify.give_up_seconds:
            log.error("%s is not told of %s: %s", target.key, parcel.notice.id, error)
            path.unlink(missing_ok=True)
        else:
            write(path, postponed(parcel, str(error), now))
        return False
    path.unlink(missing_ok=True)
    return True


def outbox_of(config: Config) -> Path:
    """`STATE/outbox/`."""
    return config.state_directory / "outbox"


def main() -> int:
    """One round; two children at once would tell everything twice, so the second leaves."""
    logs.configure()
    try:
        config = configuration.load(Path(sys.argv[1]))
    except configuration.ConfigError as error:  # edited, and not taken by the daemon yet
        log.error("nothing is delivered: %s", error)
        return EX_CONFIG
    with (outbox_of(config) / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        deliver(config, time.time())
    return 0


if __name__ == "__main__":
    sys.exit(main())
