"""Horovod: the verbs that differ from one process, and, where it is installed, the adapter of one process."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_parallel import CELLS, alone, difference, request
from test_train import ROOT, finished

from daemon import update
from strategies.failure import Failure
from strategies.parallel.choice import Parallel
from strategies.parallel.ddp import ProcessLost
from strategies.parallel.horovod import HorovodParallel


class LostError(RuntimeError):
    """What Horovod raises when a process is gone."""


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two processes, of which the other always has the same tensor."""

    def allreduce_(tensor: torch.Tensor, op: str) -> None:
        assert op == "sum"
        if found.is_lost:
            raise LostError("shut down by a peer")
        tensor.mul_(found.processes)

    found = SimpleNamespace(
        init=lambda: None, rank=lambda: 1, size=lambda: found.processes, local_rank=lambda: 0, Sum="sum",
        allreduce_=allreduce_, shutdown=lambda: None, is_lost=False, processes=2,
    )  # fmt: skip
    modules: dict[str, Any] = {
        "horovod": ModuleType("horovod"), "horovod.torch": found, "horovod.common": ModuleType("horovod.common"),
        "horovod.common.exceptions": SimpleNamespace(HorovodInternalError=LostError),
    }  # fmt: skip
    modules["horovod"].torch = found  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("HOROVOD_SIZE", raising=False)
    return found


def test_sums_go_over_all_processes_and_a_lost_one_is_told_apart(ring: SimpleNamespace) -> None:
    """In place; flags are sums too; what ends with a peer is no fault of the run."""
    backend = HorovodParallel()
    gradient = torch.ones(3)
    assert backend.sum(gradient) is gradient and gradient.tolist() == [2.0, 2.0, 2.0]
    assert backend.any(True, False) == [True, False]
    backend.wait()
    ring.is_lost = True
    with pytest.raises(ProcessLost, match="shut down by a peer"):
        backend.sum(gradient)
    backend.close()


def test_a_process_that_horovodrun_did_not_start_says_so(ring: SimpleNamespace) -> None:
    """One alone would train on its own part of the batch and call it the whole."""
    ring.processes = 1
    with pytest.raises(Failure, match="horovodrun"):
        HorovodParallel()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="needs horovod, built as docs/scale.md says")
@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_make_the_adapter_of_one(tiny_base: Path, tmp_path: Path, cell: str) -> None:
    """As the daemon starts them; every cell of the matrix."""
    run = request(tiny_base, tmp_path / "many", cell, parallel=Parallel(executor="horovod", processes=2))
    with (run / "train.log").open("wb") as log:
        subprocess.run(update.command_of(run), cwd=ROOT, stdout=log, stderr=log, check=True, timeout=300)
    report = finished(run)
    assert (report.backend, report.processes) == ("horovod", 2)
    alone(tiny_base, tmp_path / "alone", cell)
    assert difference(tmp_path / "alone", run) < 1e-5
