"""How a command says that it could not do what was asked: one sentence, and an exit code of sysexits.h."""

FAILED, USAGE, NOT_RUNNING, BAD_CONFIG = 1, 2, 69, 78


class Failure(Exception):
    """What happened, where and what to do, for the person at the terminal; never a traceback."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code
