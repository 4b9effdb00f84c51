"""One update on a Ray cluster: `python -m strategies.ray_train RUN_DIR`, in the place of `strategies.train`.

This process only places the work and waits. Ray Train starts `processes` workers on the nodes that have room; each
does what a process of torchrun does, in the same run directory, which every node must see at the same path, like the
base model. When a worker or its node is lost, the group begins again from the run's checkpoint, `LOSSES_MAX` times at
the most; a cluster that stays too small for `ray_cluster.PATIENCE_SECONDS` ends the run. Exit codes and files are
those of `strategies.request`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from strategies import ray_cluster, ray_worker
from strategies.request import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TRAINED,
    RunReport,
    RunRequest,
    read_report,
    read_request,
    write,
)

LOSSES_MAX = 3
"""So often a run begins again from its checkpoint before it fails."""
PLACE_SECONDS = 1.0


class Placing:
    """The run as this process sees it: told to stop or not, at work or at its end."""

    def __init__(self, run_directory: Path, request: RunRequest) -> None:
        self.run_directory, self.request = run_directory, request
        self.error = ""
        """Why the group could not finish."""
        self._is_stopping = False
        self._thread = threading.Thread(target=self._fit, daemon=True)

    def stop(self, *_signal: object) -> None:
        """SIGTERM: every worker writes its part of the checkpoint and leaves."""
        self._is_stopping = True
        (self.run_directory / "stop").touch()

    def run(self) -> int:
        """Until there is a report, or a reason why there never will be one; returns the exit code."""
        room = ray_cluster.Room(self.needed())
        self._thread.start()
        while self._thread.is_alive():
            self._thread.join(PLACE_SECONDS)
            if self._thread.is_alive() and (shortage := room.shortage()):
                return fail(self.run_directory, self.request.run_id, shortage)
        report = read_report(self.run_directory)
        if report is not None:
            return EXIT_TRAINED if report.status == "trained" else EXIT_FAILED
        if self._is_stopping:
            return EXIT_INTERRUPTED
        return fail(self.run_directory, self.request.run_id, self.error or "the workers ended without a report")

    def needed(self) -> dict[str, float]:
        """What all workers together take."""
        each = {"CPU": float(self.request.threads)} | ({"GPU": 1.0} if self.request.device == "cuda" else {})
        return {name: amount * self.request.parallel.processes for name, amount in each.items()}

    def _fit(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.backend import Backend
        from ray.train.torch import TorchConfig, TorchTrainer

        class Unjoined(TorchConfig):
            """The workers join each other, as under torchrun."""

            backend_cls = Backend

        parallel, is_cuda = self.request.parallel, self.request.device == "cuda"
        trainer = TorchTrainer(
            ray_worker.work,
            train_loop_config={"run_directory": str(self.run_directory)},
            torch_config=Unjoined(),
            scaling_config=ScalingConfig(
                num_workers=parallel.processes, use_gpu=is_cuda, resources_per_worker={"CPU": self.request.threads}
            ),
            run_config=RunConfig(
                name=f"{self.request.run_id}-{time.time_ns()}", storage_path=str(self.run_directory / "ray"),
                failure_config=FailureConfig(max_failures=LOSSES_MAX),
            ),
        )  # fmt: skip
        try:
            trainer.fit()
        except Exception as error:  # of whatever kind: it becomes the reason of the run
            self.error = f"the cluster gave the run up: {str(error).strip().splitlines()[-1]}"


def fail(run_directory: Path, run_id: str, reason: str) -> int:
    """Write the report of a run that the cluster could not finish; its checkpoint stays."""
    report = RunReport(run_id=run_id, status="failed", code="cluster_lost", reason=reason)
    write(run_directory / "report.json", report)
    return EXIT_FAILED


def main(run_directory: Path) -> int:
    """Do the run; returns the exit code. A run that has its report is not done again."""
    report = read_report(run_directory)
    if report is not None:
        return EXIT_TRAINED if report.status == "trained" else EXIT_FAILED
    request = read_request(run_directory)
    (run_directory / "stop").unlink(missing_ok=True)
    placing = Placing(run_directory, request)
    signal.signal(signal.SIGTERM, placing.stop)
    try:
        with ray_cluster.joined(shows_workers=True):
            return placing.run()
    except ray_cluster.NoCluster as missing:
        return fail(run_directory, request.run_id, str(missing))
    finally:
        shutil.rmtree(run_directory / "ray", ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m strategies.ray_train RUN_DIR")
    sys.exit(main(Path(sys.argv[1])))
