"""Why something cannot be taken in: raised by the parsers, written to the quarantine by the step."""


class Problem(Exception):
    """A bad file or a bad line; the message says what is wrong and what to do, the rest says where."""

    def __init__(
        self, code: str, message: str, *, line: int | None = None, byte_offset: int | None = None,
        stage: str = "parse", retryable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.code, self.message, self.stage, self.retryable = code, message, stage, retryable
        self.line, self.byte_offset = line, byte_offset


class Moved(Exception):
    """The file changed or went while it was read: nothing is taken in, the watcher will bring it again."""
