"""The configuration: one TOML file, strict, every unit in a name."""

from daemon.config.check import ConfigError as ConfigError
from daemon.config.file import load as load
from daemon.config.tables import NAME as NAME
from daemon.config.tables import Config as Config
from daemon.config.tables import Engine as Engine
from daemon.config.tables import Gate as Gate
from daemon.config.tables import Intake as Intake
from daemon.config.tables import Model as Model
from daemon.config.tables import Schedule as Schedule
from daemon.config.tables import Watch as Watch
