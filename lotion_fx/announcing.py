"""Says that graphs are being compiled, where that takes so long that one might think the training hangs."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

LOG = logging.getLogger("lotion_fx")
PATIENCE = 10.0  # seconds of compiling after which it is said


class Announcer:
    """Says so once in a call of a model, when the graphs that it waits for have taken `PATIENCE` together.

    Attributes:
        spent: seconds on graphs in this call.
        said: whether it was said.
    """

    def __init__(self) -> None:
        self.spent, self.said = 0.0, False

    def new_call(self) -> None:
        """A model is called."""
        self.spent, self.said = 0.0, False

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Around the compiling of one graph, which the message calls ``what``."""
        if self.said:
            yield
            return
        start = time.monotonic()
        timer = threading.Timer(max(0.0, PATIENCE - self.spent), self._say, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.spent += time.monotonic() - start

    def _say(self, what: str) -> None:
        self.said = True
        LOG.warning(
            "compiling %s, for more than %.0f s: the first step of a model and the first of each later phase wait "
            "for their graphs, as under torch.compile; later ones do not",
            what,
            PATIENCE,
        )


announcer = Announcer()
