"""The one exception that becomes an HTTP answer."""


class Refusal(Exception):
    """What the server will not do: an HTTP status, one sentence, and when asking again makes sense (seconds)."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
