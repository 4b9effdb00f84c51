"""Hands one notice to one target: a signed web hook, or any service that Apprise knows."""

import base64
import hashlib
import hmac
import time
from pathlib import Path

import msgspec

from daemon.notify.notices import Notice
from daemon.notify.outbox import Target

TIMEOUT_SECONDS = 10.0
GONE = 410
"""The receiver wants no more of it (Standard Webhooks)."""


class NotDelivered(Exception):
    """Why a target did not take a notice; without its address, which may hold a password."""

    def __init__(self, message: str, *, for_good: bool = False) -> None:
        super().__init__(message)
        self.for_good = for_good
        """Trying again would not help."""


def send(notice: Notice, target: Target, secret_file: Path | None) -> None:
    """Deliver; raises NotDelivered."""
    if target.kind == "webhook":
        _send_webhook(notice, target.address, _secret(secret_file))
    else:
        _send_apprise(notice, target.address)


def _send_webhook(notice: Notice, url: str, secret: bytes) -> None:
    import httpx

    body = msgspec.json.encode({"type": notice.event, "timestamp": _iso(notice.at), "data": notice})
    headers = {"content-type": "application/json", **signed(notice.id, int(time.time()), body, secret)}
    try:
        # no redirects: a signed body goes to the receiver that was named, or nowhere
        answer = httpx.post(url, content=body, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=False)
    except httpx.HTTPError as error:
        raise NotDelivered(f"{type(error).__name__}: {error}") from None
    if not answer.is_success:
        raise NotDelivered(f"the receiver answered {answer.status_code}", for_good=answer.status_code == GONE)


def signed(identity: str, at: int, body: bytes, secret: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks 1.0.0 (standardwebhooks.com): HMAC-SHA256 over `id.timestamp.body`."""
    digest = hmac.new(secret, f"{identity}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": identity,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def _secret(path: Path | None) -> bytes:
    if path is None:
        raise NotDelivered("[notify] webhook_secret_file is not set")
    try:
        text = path.read_text("utf-8").strip()
    except OSError as error:
        raise NotDelivered(f"{path}: {error.strerror}") from None
    return secret_of(text)


def secret_of(text: str) -> bytes:
    """The key: what follows `whsec_` is base64, anything else is the key itself."""
    return base64.b64decode(text.removeprefix("whsec_")) if text.startswith("whsec_") else text.encode()


def _send_apprise(notice: Notice, address: str) -> None:
    try:
        import apprise
    except ImportError:
        raise NotDelivered("Apprise is not installed: pip install 'eternad[notify]'") from None
    service = apprise.Apprise()
    if not service.add(address):
        raise NotDelivered("Apprise does not know this kind of URL", for_good=True)
    kind = apprise.NotifyType.SUCCESS if notice.event in ("live", "test") else apprise.NotifyType.WARNING
    if not service.notify(body=notice.text, title=f"eternad: {notice.event}", notify_type=kind):
        raise NotDelivered("the service did not take it; see https://github.com/caronc/apprise for its URL")


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
