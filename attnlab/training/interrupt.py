"""SIGTERM and Ctrl-C as a wish to stop, to be granted when the current step is done."""

import os
import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(SystemExit):
    """Training was stopped by a signal, after the step in progress was done and saved.

    Where nobody catches it, the program ends without a traceback and with the exit status that shells give to a program
    that the signal ended: 130 for Ctrl-C (SIGINT), 143 for SIGTERM.

    Attributes:
      signal: that was received.
      step: that was saved.
      code: 128 + `signal`.
    """

    def __init__(self, received: signal.Signals, step: int):
        super().__init__(128 + received)
        self.signal, self.step = received, step


class StopRequests:
    """Within this context, the first SIGTERM or Ctrl-C sets `received`; the next one acts as it would outside.

    Python runs signal handlers in the main thread alone: elsewhere, the context does nothing.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        # Not `print`: the signal may have come in the middle of one.
        os.write(2, f"\n{self.received.name}: finishing the step and saving; once more to stop at once\n".encode())
        self.__exit__()
