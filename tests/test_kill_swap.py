"""SIGKILL of daemon, gateway and engine between the steps of a swap: the alias ends on the live version, whole."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from kill_kit import wait, write_drop
from swap_lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The three processes, with version 1 live; the tests go on with what the one before has left."""
    lab = Lab(tmp_path_factory.mktemp("swap"))
    lab.keep()
    try:
        until_served(lab, drop(lab))
        yield lab
    finally:
        lab.close()


def drop(lab: Lab) -> int:
    """Ten examples, enough for an update; the number of the version that they will make."""
    write_drop(lab.directory, f"{lab.drops}.jsonl", range(lab.drops * 10, lab.drops * 10 + 10))
    lab.drops += 1
    return lab.drops


def until_served(lab: Lab, number: int) -> None:
    """Whoever died is started again, and nothing else is done by hand."""

    def served() -> bool:
        lab.keep()
        live, _, _ = lab.state()
        return live is not None and live >= number and lab.serves_live()

    wait(served, 90, f"version {number} answers players", lab.log)


@pytest.mark.parametrize("point", ["CANARY:before", "CANARY:after", "LIVE:before", "LIVE:after"])
def test_a_daemon_killed_around_a_step_of_the_swap(lab: Lab, point: str) -> None:
    """Before and after the share, before and after all requests: the next one ends the swap."""
    daemon = lab.children["daemon"]
    daemon.kill()
    daemon.start(ETERNAD_FAILPOINT=point)
    number = drop(lab)
    wait(lambda: daemon.process and daemon.process.poll() == -signal.SIGKILL, 60, f"it dies at {point}", lab.log)
    until_served(lab, number)
    lab.check()


def kill_at_random(lab: Lab, kills: int, seed: int) -> Counter[str]:
    """Swap after swap, each with up to three kills after its version was accepted; who was killed how often."""
    draw, done = random.Random(seed), Counter[str]()
    lab.keep()
    while done.total() < kills:
        number = drop(lab)
        wait(lambda: lab.state()[1] in ("ACCEPTED", "PUBLISHED", "CANARY"), 90, "a version is accepted", lab.log)
        for _ in range(min(3, kills - done.total())):
            time.sleep(draw.uniform(0.0, 0.3))
            victim = draw.choice(["daemon", "gateway", "engine"])
            lab.children[victim].kill()
            lab.children[victim].start()
            done[victim] += 1
        until_served(lab, number)
        lab.collect_garbage()
        lab.check()
    return done


def test_killed_at_random_in_mid_swap(lab: Lab) -> None:
    """Four times, whoever it is."""
    assert kill_at_random(lab, 4, seed=3).total() == 4


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_two_hundred_times_in_mid_swap(lab: Lab) -> None:
    """200 times, with old versions removed after every swap."""
    done = kill_at_random(lab, int(os.environ.get("ETERNAD_KILLS", "200")), seed=7)
    print(f"killed: {dict(done)}; {lab.state()[0]} versions")
