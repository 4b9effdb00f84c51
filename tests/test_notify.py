"""Notices: told once, signed, kept on disk until the receiver takes them; a receiver that fails harms nobody."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from faults_kit import Make, engine_fixture, lab_fixture, make_fixture, state_of
from operator_kit import config_fixture, eternad_fixture
from operator_kit import make_config as make_toml
from service_kit import drop, turn_until

from daemon.config import ConfigError, load
from daemon.notify import outbox, send
from daemon.notify.deliver import deliver, outbox_of
from daemon.notify.notices import Notice, of_audit, of_numbers
from daemon.notify.settings import Notify

__all__ = ["config_fixture", "engine_fixture", "eternad_fixture", "lab_fixture", "make_fixture"]

NOTICE = Notice(id="audit-7", event="failed", at=1.8e9, subject="npc-00001", text="run npc-00001 has failed: oom")
SECRET = "a key of some length"


class Receiver:
    """A web hook's other end on loopback: answers with the statuses that it was given, the last for ever."""

    def __init__(self) -> None:
        self.answers = [200]
        self.got: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                status = receiver.answers.pop(0) if len(receiver.answers) > 1 else receiver.answers[0]
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Silent."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook/s3cret"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def told(self) -> list[str]:
        """The events that came, in their order."""
        return [json.loads(body)["type"] for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """One that takes everything."""
    found = Receiver()
    yield found
    found.close()


def settings(receiver: Receiver, tmp_path: Path, **changes: Any) -> Notify:
    """`[notify]` with one web hook."""
    (tmp_path / "secret").write_text(SECRET + "\n")
    given = {"webhook_urls": [receiver.url], "webhook_secret_file": tmp_path / "secret"} | changes
    return Notify(**given)


def test_signatures_are_those_of_the_standard() -> None:
    """The example of the Standard Webhooks libraries."""
    secret = send.secret_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = send.signed("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', secret)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_receiver_can_check_who_speaks(receiver: Receiver, tmp_path: Path) -> None:
    """Id, time and body are covered by the key that both know."""
    send.send(NOTICE, outbox.Target("webhook", receiver.url), settings(receiver, tmp_path).webhook_secret_file)
    [(headers, body)] = receiver.got
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert json.loads(body)["data"]["text"] == NOTICE.text


def laid_down(make: Make, receiver: Receiver, tmp_path: Path, **changes: Any) -> Any:
    """A configuration whose outbox holds one parcel."""
    config = make(None, {"notify": settings(receiver, tmp_path, **changes)}).house.config
    outbox.put(outbox_of(config), [NOTICE], [target.key for target in outbox.targets(config.notify)], 1000.0)
    return config


def test_what_fails_is_tried_again_later_and_only_then(make: Make, receiver: Receiver, tmp_path: Path) -> None:
    """Not before its pause is over, each pause twice as long; delivered once it is taken, and gone."""
    config = laid_down(make, receiver, tmp_path)
    receiver.answers = [500, 503, 200]
    assert [deliver(config, at) for at in (1000.0, 1005.0, 1010.0, 1025.0, 1031.0)] == [0, 0, 0, 0, 1]
    assert len(receiver.got) == 3
    assert outbox.waiting(outbox_of(config)) == []


def test_a_receiver_that_is_down_waits_and_says_why(make: Make, receiver: Receiver, tmp_path: Path) -> None:
    """The parcel keeps the reason and the number of tries, and nothing of the address, which may hold a password."""
    config = laid_down(make, receiver, tmp_path)
    receiver.answers = [500]
    deliver(config, 1000.0)
    [parcel] = outbox.waiting(outbox_of(config))
    assert (parcel.attempts, parcel.error) == (1, "the receiver answered 500")
    assert not any(b"s3cret" in path.read_bytes() for path in outbox_of(config).iterdir())


def test_pauses_are_an_hour_at_most_and_then_it_is_given_up(make: Make, receiver: Receiver, tmp_path: Path) -> None:
    """After `give_up_seconds` the notice is dropped, with an error in the log."""
    parcel = outbox.Parcel(notice=NOTICE, target="webhook-1", since=0.0, attempts=30)
    assert outbox.postponed(parcel, "down", 0.0).next_at == 3600.0
    config = laid_down(make, receiver, tmp_path, give_up_seconds=60.0)
    receiver.answers = [500]
    assert deliver(config, 1061.0) == 0
    assert outbox.waiting(outbox_of(config)) == []


@pytest.mark.parametrize("answer", [410])
def test_a_receiver_that_wants_no_more_gets_no_more(
    make: Make, receiver: Receiver, tmp_path: Path, answer: int
) -> None:
    """410 Gone ends it at once."""
    config = laid_down(make, receiver, tmp_path)
    receiver.answers = [410]
    deliver(config, 1000.0)
    assert outbox.waiting(outbox_of(config)) == []


def test_a_parcel_for_nobody_and_a_torn_one_harm_nothing(make: Make, receiver: Receiver, tmp_path: Path) -> None:
    """A target that left the configuration is forgotten; what is no parcel is left alone."""
    config = laid_down(make, receiver, tmp_path)
    outbox.put(outbox_of(config), [NOTICE], ["webhook-gone"], 1000.0)
    (outbox_of(config) / "torn.json").write_text('{"notice": {')
    assert deliver(config, 1000.0) == 1
    assert [path.name for path in outbox_of(config).glob("*.json")] == ["torn.json"]


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # apprise imports it where it exists
def test_apprise_carries_it_to_its_services(make: Make, receiver: Receiver, tmp_path: Path) -> None:
    """Each line of the file is a target; one that Apprise does not know is given up, with the reason in the log."""
    (tmp_path / "urls").write_text(f"# on call\n{receiver.url.replace('http://', 'json://')}\nnonsense://x\n")
    config = laid_down(make, receiver, tmp_path, webhook_urls=[], apprise_file=tmp_path / "urls")
    assert deliver(config, 1000.0) == 1
    assert json.loads(receiver.got[0][1])["message"] == NOTICE.text
    assert outbox.waiting(outbox_of(config)) == []


def test_numbers_are_told_of_when_they_have_grown() -> None:
    """The quarantine at each step, review and disk once until they are empty again; a restart repeats nothing."""
    marks: dict[str, int] = {}
    told = []
    for quarantined, held, low in ((3, 0, 0), (20, 1, 0), (25, 9, 1), (41, 9, 1), (2, 0, 0), (21, 1, 0), (22, 1, 1)):
        change = of_numbers({"quarantine/npc": quarantined, "review/npc": held, "disk/": low}, marks, 20, 1.8e9)
        marks = change.marks
        told.append([notice.event for notice in change.notices])
    assert told == [[], ["quarantine", "review"], ["disk"], ["quarantine"], [], ["review"], ["quarantine", "disk"]]


def test_a_runs_end_is_told_with_its_reason() -> None:
    """And its id is that of the audit row."""
    notice = of_audit(7, 1.8e9, "run.REJECTED", "npc-00003", {"reason": "loss on the new hold-out 2.5 -> 4.0"})
    assert notice.id == "audit-7"
    assert notice.text == "The gate has turned run npc-00003 down: loss on the new hold-out 2.5 -> 4.0"


def test_the_daemon_tells_of_a_run_once(make: Make, receiver: Receiver, lab: Path, tmp_path: Path) -> None:
    """A version goes live, another candidate is rejected: told by the child; a restarted daemon does not repeat it."""
    (tmp_path / "eternad.toml").write_text(
        make_toml(tmp_path).read_text()
        + f'[notify]\nwebhook_urls = ["{receiver.url}"]\nwebhook_secret_file = "secret"\n'
    )
    changes = {"notify": settings(receiver, tmp_path)}
    service = make(None, changes)
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "LIVE" and receiver.told() == ["live"], 60)
    (lab / "orders").write_text("bad")
    drop(service, range(10, 20))
    turn_until(service, lambda: receiver.told() == ["live", "rejected"], 60)
    # the receiver has it before the child has taken it out of the outbox
    turn_until(service, lambda: not outbox.waiting(outbox_of(service.house.config)), 60)
    service = make(None, changes)
    for turn in range(5):
        service.tick(2e9 + turn)
    assert outbox.waiting(outbox_of(service.house.config)) == []
    assert receiver.told() == ["live", "rejected"]


def test_events_that_are_not_wanted_are_not_told(make: Make, receiver: Receiver, tmp_path: Path) -> None:
    """`events` names those that are."""
    service = make(None, {"notify": settings(receiver, tmp_path, events=["failed"])})
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "LIVE")
    service.tick(1.9e9)
    assert outbox.waiting(outbox_of(service.house.config)) == []


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('webhook_urls = ["http://example.org/x"]\nwebhook_secret_file = "s"', "must begin with https://"),
        ('webhook_urls = ["https://example.org/x"]', "needs webhook_secret_file"),
        ('events = ["life"]', "Invalid enum value 'life'"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_sentence(tmp_path: Path, table: str, said: str) -> None:
    """What is wrong and what to do."""
    path = make_toml(tmp_path, f"[notify]\n{table}")
    with pytest.raises(ConfigError, match=said):
        load(path)


def test_the_command_tries_everybody(eternad: Any, config: Path, receiver: Receiver) -> None:
    """Delivered: one line each; a receiver that does not take it: exit 1, its key and not its address."""
    (config.parent / "secret").write_text(SECRET)
    make_toml(config.parent, f'[notify]\nwebhook_urls = ["{receiver.url}"]\nwebhook_secret_file = "secret"')
    assert "delivered" in eternad("notify", "test")
    assert receiver.told() == ["test"]
    receiver.answers = [404]
    said = eternad("notify", "test", code=1)
    assert "not delivered to webhook-" in said and "s3cret" not in said


def test_the_command_shows_what_waits(eternad: Any, config: Path) -> None:
    """Nobody is told: a failure that says which keys are missing; a parcel with its error."""
    assert "webhook_urls" in eternad("notify", "test", code=78)
    assert "everything is delivered" in eternad("notify", "ls")
    place = load(config).state_directory / "outbox"
    place.parent.mkdir()
    outbox.put(place, [NOTICE], ["webhook-1"], 1000.0)
    parcel = outbox.postponed(outbox.waiting(place)[0], "the receiver answered 500", 1000.0)
    (place / "audit-7.webhook-1.json").write_bytes(msgspec.json.encode(parcel))
    assert "answered 500" in eternad("notify", "ls")
