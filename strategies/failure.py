"""The one exception by which a run says why it cannot be done."""


class Failure(Exception):
    """A run failed for a known reason: `code` for machines, the message for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
