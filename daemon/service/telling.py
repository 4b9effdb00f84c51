"""Tells people what happened: looks for what is new, lays it into the outbox, starts the child that delivers it."""

import subprocess
import sys
import time
from pathlib import Path

from daemon.notify import outbox
from daemon.notify.deliver import outbox_of
from daemon.notify.notices import FROM_AUDIT, Notice, of_audit, of_numbers
from daemon.service.house import House, log
from daemon.state import summary, tellings
from daemon.state.database import transaction

NUMBERS_SECONDS = 60.0
ROUND_SECONDS = 300.0
"""A delivery that takes longer is ended; what it did not deliver waits for the next."""


class Telling:
    """One per daemon. A receiver that fails costs a notice some time, never the daemon a turn."""

    def __init__(self, house: House, config_path: Path) -> None:
        self._house, self._config_path = house, config_path
        self._seen, self._marks = tellings.begin(house.database), tellings.marks(house.database)
        self._child: subprocess.Popen[bytes] | None = None
        self._child_since = self._numbers_at = self._look_at = 0.0

    def turn(self, now: float) -> None:
        """What is new into the outbox; deliver what is due."""
        if not self._house.config.notify.is_on:
            return
        up_to, rows = tellings.untold(self._house.database, self._seen, FROM_AUDIT)
        notices, marks = [of_audit(*row) for row in rows], self._marks
        is_due = not self._numbers_at <= now < self._numbers_at + NUMBERS_SECONDS  # also when the clock was set back
        if is_due:
            self._numbers_at = now
            change = of_numbers(self._numbers(), marks, self._house.config.notify.quarantine_step, now)
            notices, marks = notices + change.notices, change.marks
        if notices or marks != self._marks or (is_due and up_to != self._seen):
            self._tell(notices, up_to, marks, now)
        self._seen, self._marks = up_to, marks
        self._deliver(now)

    def _tell(self, notices: list[Notice], up_to: int, marks: dict[str, int], now: float) -> None:
        """The files come first: after a crash between the two, told twice with one id is better than never."""
        settings, place = self._house.config.notify, outbox_of(self._house.config)
        outbox.put(place, [each for each in notices if each.event in settings.events], self._keys(), now)
        with transaction(self._house.database) as connection:
            tellings.remember(connection, up_to, marks)
        if notices:
            self._look_at = now

    def _numbers(self) -> dict[str, int]:
        quarantined = dict.fromkeys(self._house.config.models, 0)
        for (model, _), number in summary.quarantine_counts(self._house.database).items():
            quarantined[model] = quarantined.get(model, 0) + number
        held = dict.fromkeys(self._house.config.models, 0) | tellings.held_counts(self._house.database)
        numbers = {f"quarantine/{model}": number for model, number in quarantined.items()}
        numbers |= {f"review/{model}": number for model, number in held.items()}
        return numbers | {"disk/": int(self._house.disk_is_low())}

    def _keys(self) -> list[str]:
        settings = self._house.config.notify
        try:
            return [target.key for target in outbox.targets(settings)]
        except OSError as error:
            log.error("[notify] apprise_file: %s; nobody is told by it", error)
            return [target.key for target in outbox.webhooks(settings)]

    def _deliver(self, now: float) -> None:
        if self._child is not None and self._child.poll() is None:
            if time.monotonic() - self._child_since > ROUND_SECONDS:
                self._child.kill()
            return
        if self._child is not None:  # it has ended: when is the next parcel due?
            self._child = None
            left = outbox.waiting(outbox_of(self._house.config))
            self._look_at = min((parcel.next_at for parcel in left), default=now + NUMBERS_SECONDS)
        if self._look_at <= now or self._look_at > now + outbox.RETRY_SECONDS_MAX:
            self._look_at = now + NUMBERS_SECONDS
            if outbox.waiting(outbox_of(self._house.config)):
                self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "daemon.notify.deliver", str(self._config_path)]
        self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._child_since = time.monotonic()

    def close(self) -> None:
        """End a delivery; what it did not finish waits in the outbox."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
