"""The composition root: the only place that imports the steps and puts them in their order."""

from daemon.service.loop import Service
from daemon.service.process import run

__all__ = ["Service", "run"]
