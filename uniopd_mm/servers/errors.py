"""What can go wrong with a server: it does not answer, or its answer cannot be used."""

from uniopd_mm.errors import UniOPDError


class ServerError(UniOPDError, RuntimeError):
    """No usable answer in spite of retries, or an HTTP error; the message says URL, path, what happened, what to type."""


class ReplyError(ServerError):
    """A reply that cannot be used; ``reason`` says why in a line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
