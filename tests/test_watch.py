"""Watching: what is finished, when, and what is never opened."""

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.config import Watch
from daemon.drop_names import Ignored, printable
from daemon.machine.mounts import file_system_of
from daemon.stability import StabilityTracker
from daemon.state.files import Finished, Signature
from daemon.watch import Watcher


def signature(size: int, ino: int = 1) -> Signature:
    """What a file of `size` bytes looks like."""
    return Signature(1, ino, size, size, size)


class Memory(dict[str, Signature]):
    """What has been taken in, as the database knows it."""

    def take(self, found: list[Finished]) -> list[str]:
        """Take files in and return their paths."""
        self.update({each.path: each.signature for each in found})
        return sorted(each.path for each in found)


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[Watcher]:
    """A watcher over an empty library that listens to no events: scans find everything."""
    made = Watcher(tmp_path / "library", Watch(stability_seconds=5, scan_seconds=60))
    made.start()
    yield made
    made.stop()


def drop(watcher: Watcher, name: str, text: str = "x") -> Path:
    """Write a file below the library."""
    path = watcher._library / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def test_a_file_is_finished_when_it_has_not_changed_for_the_stability_time() -> None:
    """Every change starts the wait anew."""
    tracker = StabilityTracker(5, 3600)
    assert tracker.see("content/m/a.txt", signature(1), None, 0)
    assert tracker.finished("content/m/a.txt", 4.9) is None
    assert not tracker.see("content/m/a.txt", signature(2), None, 4)
    assert tracker.finished("content/m/a.txt", 8.9) is None
    finished = tracker.finished("content/m/a.txt", 9)
    assert finished is not None and finished.signature == signature(2)


def test_a_file_that_was_not_taken_in_comes_again_with_back_off_until_it_is_known() -> None:
    """A full disk for an hour must not lose a file, nor spin."""
    tracker = StabilityTracker(0, 3600)
    tracker.see("content/m/a", signature(1), None, 0)
    times = [now for now in range(0, 100) if tracker.finished("content/m/a", now)]
    assert times == [0, 5, 15, 35, 75]
    tracker.see("content/m/a", signature(1), signature(1), 100)
    assert len(tracker) == 0


def test_a_file_of_which_some_was_taken_in_comes_again_at_once() -> None:
    """A long feedback file is read in portions."""
    tracker = StabilityTracker(5, 3600)
    tracker.see("feedback/m/s/a.jsonl", signature(9), None, 0)
    assert tracker.finished("feedback/m/s/a.jsonl", 0) is not None
    tracker.see("feedback/m/s/a.jsonl", signature(9), signature(4), 0.5)
    assert tracker.finished("feedback/m/s/a.jsonl", 0.5) is not None


def test_a_file_that_never_settles_is_told_of_once_an_hour() -> None:
    """`never_stable` is a finished file with a problem, so that it reaches the quarantine list."""
    tracker, problems = StabilityTracker(5, 3600), []
    for now in range(0, 7300, 2):
        tracker.see("content/m/a", signature(now), None, now)
        finished = tracker.finished("content/m/a", now)
        problems += [] if finished is None else [(now, finished.problem)]
    assert problems == [(3600, "never_stable"), (7200, "never_stable")]


def test_a_clock_that_is_set_back_does_not_hold_a_file_up() -> None:
    """An hour back, and the file still takes only its stability time."""
    tracker = StabilityTracker(5, 3600)
    tracker.see("content/m/a", signature(1), None, 7200)
    assert tracker.finished("content/m/a", 3600) is None
    assert tracker.finished("content/m/a", 3606) is not None


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: creating 20,000 files takes ext4 ten seconds."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def test_the_first_scan_finds_what_came_while_the_daemon_was_stopped(fast_path: Path) -> None:
    """20,000 files, no event for any of them."""
    directory = fast_path / "library" / "content" / "npc"
    directory.mkdir(parents=True)
    for number in range(20_000):
        (directory / f"{number}.txt").touch()
    watcher, memory = Watcher(fast_path / "library", Watch(stability_seconds=5)), Memory()
    watcher.start()
    try:
        assert watcher.finished(0, memory.get) == []
        for now in range(5, 200):
            memory.take(watcher.finished(now, memory.get, limit=1000))
            if len(memory) == 20_000:
                break
        assert len(memory) == 20_000
        watcher.finished(300, memory.get)
        assert watcher.waiting == 0
    finally:
        watcher.stop()


def test_links_pipes_sockets_and_devices_are_told_of_once_and_never_opened(watcher: Watcher, tmp_path: Path) -> None:
    """Opening a FIFO would hang the daemon; a link could name any file of the machine."""
    place = watcher._library / "content"
    (place / "link.txt").symlink_to("/etc/shadow")
    (place / "linked").symlink_to("/etc", target_is_directory=True)
    os.mkfifo(place / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "socket.txt"))
    memory = Memory()
    found = watcher.finished(0, memory.get)
    assert {each.problem for each in found} == {"not_a_file"}
    assert memory.take(found) == [f"content/{name}" for name in ("link.txt", "linked", "pipe.txt", "socket.txt")]
    watcher.request_scan()
    assert watcher.finished(1, memory.get) == []


def test_names_of_any_bytes_are_found_and_stay_apart(watcher: Watcher) -> None:
    """Line breaks, invalid UTF-8, both Unicode forms of one accent, a direction override, 255 bytes."""
    names = [
        b"a\nb",
        b"\xff\xfe",
        "\u00e9".encode(),
        "e\u0301".encode(),
        "a\u202eb".encode(),
        b"x" * 251,
        b"back\\x0aslash",
    ]
    for name in names:
        place = os.fsencode(watcher._library / "content") + b"/" + name + b".txt"
        with open(place, "wb") as file:  # noqa: PTH123 - pathlib takes no bytes
            file.write(b"text")
    memory = Memory()
    watcher.finished(0, memory.get)
    found = watcher.finished(5, memory.get)
    assert len({each.path for each in found}) == len(names)
    assert all(each.path.isprintable() for each in found)
    assert {os.fsencode(each.relative) for each in found} == {b"content/" + name + b".txt" for name in names}


def test_an_event_brings_a_file_before_the_next_scan(watcher: Watcher) -> None:
    """Events only make it faster: here the scan is a minute away."""
    memory = Memory()
    watcher.finished(0, memory.get)
    drop(watcher, "content/npc/new/deep/a.txt")
    wait_for(lambda: watcher.finished(1, memory.get) == [] and watcher.waiting == 1)
    assert memory.take(watcher.finished(6, memory.get)) == ["content/npc/new/deep/a.txt"]
    assert watcher.scans_total == 1


def test_a_file_renamed_from_a_temporary_name_needs_no_wait(watcher: Watcher) -> None:
    """Whoever writes to a temporary name and renames it says that it is complete."""
    memory = Memory()
    drop(watcher, "content/npc/a.txt.tmp")
    assert watcher.finished(0, memory.get) == []
    drop(watcher, "content/npc/b.txt")  # its event says that the new directory is watched by now
    wait_for(lambda: watcher.finished(0, memory.get) == [] and watcher.waiting == 1)
    (watcher._library / "content/npc/a.txt.tmp").rename(watcher._library / "content/npc/a.txt")
    found: list[Finished] = []
    wait_for(lambda: bool(found.extend(watcher.finished(0.5, memory.get)) or found))
    assert [each.path for each in found] == ["content/npc/a.txt"]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait (at most 20 s) until a condition holds: events come from another thread."""
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come true in 20 s")


def test_a_root_that_is_renamed_or_replaced_is_degraded_until_it_is_back(watcher: Watcher) -> None:
    """An empty directory in its place (an unmounted file system) is not "everything was deleted"."""
    memory, library = Memory(), watcher._library
    drop(watcher, "content/npc/a.txt")
    library.rename(library.with_name("elsewhere"))
    assert watcher.finished(0, memory.get) == [] and "put it back" in str(watcher.degraded)
    library.mkdir()
    assert watcher.finished(1, memory.get) == [] and "another directory" in str(watcher.degraded)
    library.rmdir()
    library.with_name("elsewhere").rename(library)
    watcher.finished(2, memory.get)
    assert watcher.degraded is None
    assert memory.take(watcher.finished(7, memory.get)) == ["content/npc/a.txt"]


def test_a_root_that_was_deleted_and_made_anew_is_watched_again(watcher: Watcher) -> None:
    """There is no old directory left to wait for."""
    memory, library = Memory(), watcher._library
    for area in library.iterdir():
        area.rmdir()
    library.rmdir()
    assert watcher.finished(0, memory.get) == [] and watcher.degraded is not None
    drop(watcher, "content/npc/a.txt")
    watcher.finished(1, memory.get)
    assert memory.take(watcher.finished(6, memory.get)) == ["content/npc/a.txt"]


def test_lost_events_are_counted_and_followed_by_a_scan(watcher: Watcher) -> None:
    """watchdog says so in its log and nowhere else."""
    memory = Memory()
    watcher.finished(0, memory.get)
    watcher._unlisten()
    drop(watcher, "content/npc/a.txt")
    watcher._listen()
    logging.getLogger("watchdog.observers.inotify_c").warning("Inotify queue overflowed; filesystem events were lost")
    watcher.finished(1, memory.get)
    assert (watcher.overflow_total, watcher.scans_total, watcher.files_found_by_rescan) == (1, 2, 1)


@pytest.mark.parametrize(
    "name",
    ["content/npc/.git/x", "content/a~", "content/~$a.docx", "content/a.crdownload", "quarantine/x", "done/x",
     "content/.syncthing.a.txt.tmp", "content/npc/Thumbs.db", "content/npc/drafts/a.txt"],
)  # fmt: skip
def test_temporary_names_and_own_directories_are_ignored(name: str) -> None:
    """What editors, browsers and sync tools write is never read; `.eternadignore` adds to it."""
    ignored = Ignored(["drafts/", "# a comment"])
    assert ignored(name)
    assert not ignored("content/npc/a.txt")


def test_printable_names_are_reversible() -> None:
    """A name that contains what an escape looks like is not mistaken for one."""
    assert printable("a\nb") != printable("a\\u000ab")
    assert printable("\U000e0001") != printable("\ue0001")
    assert printable("La Biblioteca Éterna.txt") == "La Biblioteca Éterna.txt"


def test_network_file_systems_are_recognised() -> None:
    """The longest mount point that holds the path decides."""
    mountinfo = (
        "22 1 8:1 / / rw - ext4 /dev/sda rw\n"
        "30 22 0:9 / /srv rw shared:1 - nfs4 host:/x rw\n"
        "31 30 0:9 / /srv/my\\040disk rw - ext4 /dev/sdb rw\n"
    )
    assert file_system_of(Path("/home"), mountinfo) == "ext4"
    assert file_system_of(Path("/srv/library"), mountinfo) == "nfs4"
    assert file_system_of(Path("/srv/my disk/library"), mountinfo) == "ext4"
