"""The command `eternad`. Never imports torch, and starts at once."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from daemon.cli.failure import BAD_CONFIG, FAILED, Failure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. What a user can mend is one sentence on stderr, not a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except Failure as failure:
        return _say(str(failure), failure.code)
    except BrokenPipeError:  # `eternad log | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _say(f"{error.filename}: {error.strerror}" if error.filename else str(error), FAILED)


def _run(arguments: list[str]) -> int:
    from daemon.config import ConfigError

    try:
        if is_plain_status(arguments):
            _status(arguments[1:])
        else:
            from daemon.cli.app import app

            if "_ETERNAD_COMPLETE" in os.environ:  # a shell asks by the script of `eternad completion`
                from typer.completion import completion_init  # type: ignore[attr-defined]  # re-exported, not declared

                completion_init()
            app(args=arguments, prog_name="eternad")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ConfigError as error:
        return _say(str(error), BAD_CONFIG)
    return 0


def is_plain_status(arguments: list[str]) -> bool:
    """`status [--json] [--config FILE]`: the command that scripts and people call most, done without typer, whose
    import costs more than all of the work."""
    rest = [each for each in arguments[1:] if each != "--json"]
    if arguments[:1] != ["status"] or "_ETERNAD_COMPLETE" in os.environ:
        return False
    return not rest or (len(rest) == 2 and rest[0] in ("--config", "-c"))


def _status(options: list[str]) -> None:
    from daemon.cli import context
    from daemon.cli.glance import print_status

    context.chosen.clear()
    path = [each for each in options if each not in ("--json", "--config", "-c")]
    print_status(Path(path[0]) if path else None, "--json" in options)


def _say(message: str, code: int) -> int:
    print(f"eternad: {message}", file=sys.stderr)
    return code
