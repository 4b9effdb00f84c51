"""What is started for an update, by its executor; that it is found again, and asked for before any work."""

import sys
from pathlib import Path

import pytest
from test_train import facts, make_run

from daemon import update
from daemon.config import ConfigError, load
from strategies.parallel import choice, launch
from strategies.parallel.choice import Parallel

CONFIG = """\
library_directory = "library"
state_directory = "state"
[engines.local]
kind = "directory"
[models.npc]
base_path = "base"
engine = "local"
[models.npc.parallel]
"""


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (Parallel(), [sys.executable, "-m", "strategies.train"]),
        (Parallel(executor="torchrun", processes=2), ["torch.distributed.run", "--nproc-per-node=2"]),
        (Parallel(executor="torchrun", processes=2, machines=2, meet_at="a:1"), ["strategies.machines"]),
        (Parallel(executor="horovod", processes=3), ["horovod.runner.launch", "-np", "localhost:3"]),
        (Parallel(executor="ray", processes=2), ["strategies.ray_train"]),
    ],
)
def test_every_executor_has_its_command(tiny_base: Path, tmp_path: Path, parallel: Parallel, words: list[str]) -> None:
    """It ends with the module and the run directory: so a daemon that comes back finds what is at work."""
    directory = make_run(tmp_path / "run", tiny_base, facts(), parallel=parallel)
    command = update.command_of(directory)
    assert set(words) <= set(command)
    assert command[-2] in launch.MODULES and command[-1] == str(directory)


def test_a_request_that_cannot_be_read_is_the_childs_to_report(tmp_path: Path) -> None:
    """And one that is not there yet needs no launcher."""
    assert update.command_of(tmp_path) == [*update.COMMAND, str(tmp_path)]
    (tmp_path / "request.json").write_text("{")
    assert update.command_of(tmp_path) == [*update.COMMAND, str(tmp_path)]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("processes = 2", "take executor = 'torchrun'"),
        ('executor = "ray"', r"the package ray, which is not installed: pip install 'eternad\[ray\]'"),
        ('executor = "horovod"', r"the package horovod, which is not installed: pip install 'eternad\[horovod\]'"),
        (
            'executor = "torchrun"\nbackend = "fabric-ddp"',
            r"the package lightning_fabric, which is not installed: pip install 'eternad\[lightning\]'",
        ),
        (
            'executor = "torchrun"\nbackend = "deepspeed-3"',
            r"the package deepspeed, which is not installed: pip install 'eternad\[deepspeed\]'",
        ),
        ('executor = "torchrun"\nprocesses = 2\nmachines = 2', "must say where 2 machines meet; take 'HOST:PORT'"),
        ('executer = "ray"', "did you mean `executor`"),
    ],
)
def test_the_configuration_refuses_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, says: str
) -> None:
    """One sentence with the table's name and what to do."""
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "eternad.toml").write_text(CONFIG + lines)
    with pytest.raises(ConfigError, match=says):
        load(tmp_path / "eternad.toml")
