"""Updates on a Ray cluster of two raylets: `make test-ray`, where Ray is installed. Not part of the CI."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from ray_kit import ROOT, Cluster, workers
from test_train import facts, finished, make_run, wait_for_step

from strategies.parallel.choice import BackendName, Parallel
from strategies.request import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TRAINED, read_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install 'eternad[ray]'"),
]
TWO = Parallel(executor="ray", processes=2, timeout_seconds=60.0)
BEGIN_SECONDS = 300.0
"""Ray, two workers and their imports, on a busy machine."""
LONG = {"epochs": 2000}
"""8,000 steps: longer than the pause between two checkpoints."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two raylets with one CPU each: a run of two processes needs both."""
    found = Cluster(1)
    try:
        found.add(1)
        yield found
    finally:
        found.close()


def start(cluster: Cluster, directory: Path) -> "subprocess.Popen[bytes]":
    """The child as the daemon starts it."""
    command = [sys.executable, "-m", "strategies.ray_train", str(directory)]
    with (directory / "train.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=log, stderr=log)


def wait_for_checkpoint(directory: Path) -> None:
    """Half a minute of steps and more."""
    deadline = time.monotonic() + 300
    while not (directory / "checkpoint.json").exists():
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.2)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_two_nodes_make_the_adapter_of_one_process(
    cluster: Cluster, tiny_base: Path, tmp_path: Path, backend: BackendName
) -> None:
    """The same losses and weights; the report says who made it; nothing of Ray's stays in the run directory.

    EWC, on both backends; the other methods are compared by `distributed_matrix.py`, which `make test-ray` runs.
    """
    from test_parallel import alone, difference, request

    alone(tiny_base, tmp_path / "alone", "ewc")
    request(tiny_base, tmp_path / "ray", "ewc", parallel=msgspec.structs.replace(TWO, backend=backend))
    assert start(cluster, tmp_path / "ray").wait() == EXIT_TRAINED
    report = finished(tmp_path / "ray")
    assert (report.status, report.backend, report.processes) == ("trained", backend, 2)
    assert difference(tmp_path / "alone", tmp_path / "ray") < 1e-5
    assert not (tmp_path / "ray" / "ray").exists()


def test_a_killed_worker_costs_no_more_than_the_steps_since_the_checkpoint(
    cluster: Cluster, tiny_base: Path, tmp_path: Path
) -> None:
    """SIGKILL to one of two workers: Ray starts both again, they go on from the checkpoint; one report, one adapter."""
    directory = make_run(tmp_path / "run", tiny_base, facts(), parallel=TWO, training=LONG)
    child = start(cluster, directory)
    wait_for_checkpoint(directory)
    os.kill(workers()[-1], signal.SIGKILL)
    assert child.wait() == EXIT_TRAINED
    report = finished(directory)
    assert report.status == "trained" and report.steps == 4 * LONG["epochs"]
    assert [step for step, _ in report.losses] == list(range(1, report.steps + 1))  # none lost, none twice
    assert (directory / "adapter" / "adapter_model.safetensors").exists()


def test_a_lost_node_without_a_replacement_fails_the_run_with_a_reason(
    cluster: Cluster, tiny_base: Path, tmp_path: Path
) -> None:
    """The cluster stays too small: given up after the patience, never waited for."""
    directory = make_run(tmp_path / "run", tiny_base, facts(), parallel=TWO, training=LONG)
    child = start(cluster, directory)
    wait_for_step(directory, 5, BEGIN_SECONDS)
    cluster.lose(1)
    assert child.wait() == EXIT_FAILED
    report = finished(directory)
    assert report.code == "cluster_lost" and "the cluster has lacked 2 CPU (there are 1)" in report.reason


def test_a_lost_head_ends_the_child(cluster: Cluster, tiny_base: Path, tmp_path: Path) -> None:
    """The whole cluster is gone: the child ends by itself, with a reason or at least with last words."""
    directory = make_run(tmp_path / "run", tiny_base, facts(), parallel=TWO, training=LONG)
    child = start(cluster, directory)
    wait_for_step(directory, 5, BEGIN_SECONDS)
    cluster.lose(0)
    assert child.wait() not in (EXIT_TRAINED, EXIT_INTERRUPTED)
    report = read_report(directory)
    if report is None:  # Ray ends a process that lost its head, with words of its own
        assert "ray" in (directory / "train.log").read_text().lower()
    else:
        assert report.code == "cluster_lost" and "the cluster gave the run up" in report.reason


def test_told_to_stop_it_leaves_with_a_checkpoint_and_goes_on(
    cluster: Cluster, tiny_base: Path, tmp_path: Path
) -> None:
    """SIGTERM to the child reaches the workers through the run directory; the same command resumes."""
    directory = make_run(tmp_path / "run", tiny_base, facts(), parallel=TWO, training={"epochs": 400})
    child = start(cluster, directory)
    wait_for_step(directory, 5, BEGIN_SECONDS)
    child.terminate()
    assert child.wait() == EXIT_INTERRUPTED
    assert (directory / "checkpoint.json").exists()
    assert start(cluster, directory).wait() == EXIT_TRAINED
    assert finished(directory).steps == 1600


def test_without_a_cluster_the_run_fails_at_once(tiny_base: Path, tmp_path: Path) -> None:
    """One sentence with the command that starts one."""
    directory = make_run(tmp_path / "run", tiny_base, facts(), parallel=TWO)
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "strategies.ray_train", str(directory)]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=False, capture_output=True)
    report = finished(directory)
    assert report.code == "cluster_lost" and "ray start --head" in report.reason
