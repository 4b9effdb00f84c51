"""The keys of `[notify]`."""

import re
from pathlib import Path
from typing import Literal

import msgspec

from strategies.catalog import Count, Positive

Event = Literal["live", "rejected", "failed", "rolled_back", "quarantine", "review", "disk"]
EVENTS: tuple[Event, ...] = ("live", "rejected", "failed", "rolled_back", "quarantine", "review", "disk")
_SAFE_URL = re.compile(r"https://[^/\s]+\S*|http://(127\.\d+\.\d+\.\d+|localhost|\[::1\])(:\d+)?(/\S*)?")


class Notify(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who is told of what. In the unit it needs the drop-in `network` (or `tcp` for a receiver on this machine)."""

    events: list[Event] = msgspec.field(default_factory=lambda: list(EVENTS))
    """What is worth a notice; `quarantine`, `review` and `disk` tell of a growth, once each."""
    webhook_urls: list[str] = msgspec.field(default_factory=list)
    """Each gets every notice as JSON, signed as Standard Webhooks say: `https://...`, or `http://` on loopback."""
    webhook_secret_file: Path | None = None
    """File with the key of the signatures (HMAC-SHA256): any text, or `whsec_` and base64."""
    apprise_file: Path | None = None
    """File with one Apprise URL a line (mail, chat, pager; they hold passwords). Needs the extra `eternad[notify]`."""
    quarantine_step: Count = 20
    """So many more refused files and lines of a model are worth a notice."""
    give_up_seconds: Positive = 259200.0
    """A receiver that takes nothing for so long misses the notice; until then it is tried at least once an hour."""

    @property
    def is_on(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self.webhook_urls or self.apprise_file)


def problem(notify: Notify) -> str | None:
    """What makes the table unusable, or None."""
    for url in notify.webhook_urls:
        if not _SAFE_URL.fullmatch(url):
            return f"webhook_urls: `{url}` must begin with https:// (http:// only for this machine's loopback)"
    if notify.webhook_urls and notify.webhook_secret_file is None:
        return "webhook_urls needs webhook_secret_file: make one with `openssl rand -hex 32`"
    return None
