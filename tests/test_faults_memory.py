"""A trainer without memory: one that the kernel ends, and one whose allocations fail."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults_kit import Make, engine_fixture, lab_fixture, make_fixture, state_of
from service_kit import MemoryEngine, drop, turn_until
from test_train import ROOT, demonstration, make_run

from buffers import claims
from daemon import update
from daemon.state import runs
from strategies.request import read_report, read_request

fixtures = (engine_fixture, lab_fixture, make_fixture)
MIB = 2**20
# the scripted trainer with a need for memory: 64 KiB for each token of a forward pass, in a cgroup of its own
HUNGRY = """
import json, os, sys
from pathlib import Path
(Path({group!r}) / "cgroup.procs").write_text(str(os.getpid()))
tokens = json.loads((Path(sys.argv[1]) / "request.json").read_text())["training"]["micro_batch_tokens"]
with open({lab!r} + "/tokens", "a") as log:
    log.write(f"{{tokens}}\\n")
memory = bytearray(b"x" * 2**16) * tokens
exec(compile(open({lab!r} + "/trainer.py").read(), "trainer.py", "exec"))
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """An empty control group whose memory the kernel bounds, of either version; none is a reason to skip."""
    second = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"]
    has_memory = [Path(root) for root in second if "memory" in (Path(root) / "cgroup.subtree_control").read_text()]
    parent = has_memory[0] if has_memory else Path("/sys/fs/cgroup/memory")
    group = parent / f"eternad-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group that bounds memory can be made: {error}")
    yield group
    group.rmdir()


def bound(group: Path, size: int) -> None:
    """Memory and swap together."""
    if (group / "memory.max").exists():
        (group / "memory.max").write_text(str(size))
        if (group / "memory.swap.max").exists():
            (group / "memory.swap.max").write_text("0")
        return
    for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
        if (group / name).exists():
            (group / name).write_text(str(size))


def use_hungry_trainer(lab: Path, group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab / "hungry.py").write_text(HUNGRY.format(group=str(group), lab=str(lab)))
    monkeypatch.setattr(update, "COMMAND", [sys.executable, str(lab / "hungry.py")])


def test_a_trainer_that_the_kernel_ends_for_its_memory_tries_with_less(
    make: Make, engine: MemoryEngine, lab: Path, group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt has half the tokens in a forward pass; the third one fits, and its version goes live."""
    bound(group, 60 * MIB)
    use_hungry_trainer(lab, group, monkeypatch)
    service = make()
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "LIVE", 60)
    assert (lab / "tokens").read_text().split() == ["2048", "1024", "512"]
    assert engine.table == {"npc": "npc@0001"}
    run = runs.recent(service.house.database, "npc", 1)[0]
    assert run.attempts == 2
    request = read_request(service.updates.directory(run))
    assert (request.training.batch_examples, request.training.micro_batch_tokens) == (8, 512)


def test_a_trainer_that_never_fits_is_a_failure_called_oom(
    make: Make, engine: MemoryEngine, lab: Path, group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three attempts, then FAILED `oom`; the examples wait, without a mark against them."""
    bound(group, 16 * MIB)
    use_hungry_trainer(lab, group, monkeypatch)
    service = make()
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "FAILED", 60)
    run = runs.recent(service.house.database, "npc", 1)[0]
    assert run.reason == "oom: the kernel ended the trainer: memory had run out (attempt 3)"
    assert (engine.table, claims.pending(service.house.database, "npc").train) == ({"npc": "base"}, 9)


def test_a_kill_that_is_not_for_memory_changes_no_request(make: Make, lab: Path) -> None:
    """The check above can fail: an operator's SIGKILL is an attempt like the first."""
    (lab / "orders").write_text("crash")
    service = make()
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "FAILED")
    run = runs.recent(service.house.database, "npc", 1)[0]
    assert run.reason.startswith("died: ")
    assert read_request(service.updates.directory(run)).training.micro_batch_tokens == 2048


# the real trainer; when training begins, its data may grow by so much and no more (setrlimit(2), RLIMIT_DATA)
SCARCE = """
import re, resource, sys
from pathlib import Path
from strategies import course, pulse, train
enter, run = pulse.Pulse.enter, course.Course.run
def scarce(self, phase):
    if phase == "train":
        used = int(re.search(r"VmData:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]), -1))
    if phase == "evaluate":
        resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
    enter(self, phase)
def telling(self):
    print(self.request.training.micro_batch_tokens)
    return run(self)
pulse.Pulse.enter, course.Course.run = scarce, telling
sys.exit(train.main(Path(sys.argv[1])))
"""


def test_allocations_that_really_fail_lead_to_smaller_passes(tiny_base: Path, tmp_path: Path) -> None:
    """The kernel refuses the trainer its memory; with a part of the tokens in a pass the update succeeds."""
    words = " ".join(f"Shelf {number} is empty." for number in range(30))
    rows = [demonstration(f"Where is door {n}?", words) for n in range(32)]
    rows += [demonstration(f"Where is hall {n}?", words, role="heldout_new") for n in range(2)]
    sizes = {"batch_examples": 32, "micro_batch_tokens": 32768, "sequence_tokens": 512, "epochs": 1}
    directory = make_run(tmp_path / "run", tiny_base, rows, training=sizes)
    command = [sys.executable, "-c", SCARCE, str(directory), str(320 * MIB)]  # one pass needs some 400 MiB
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    report, asked = read_report(directory), [int(line) for line in done.stdout.split()]
    assert report is not None
    assert (report.status, report.reason) == ("trained", "")
    assert 2 <= len(asked) <= 4
    assert asked == [32768 // 2**halved for halved in range(len(asked))]
