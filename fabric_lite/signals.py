"""SIGTERM and SIGUSR1, by which schedulers ask a run to leave, told to whoever can do so in an orderly way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import weakref
from typing import Any, Protocol

__all__ = ["REPEAT_SECONDS", "Listener", "leave_to_parent", "requests"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# One request often arrives twice: from the scheduler, and passed on by a launcher.
REPEAT_SECONDS = 2.0
_STUCK_SECONDS = 0.5


class Listener(Protocol):
    """Who is told of a request."""

    def asked(self, name: str) -> None:
        """A signal of this name has arrived; called from a signal handler or from any thread, also again."""


class _Requests:
    """The handlers of this process: there while somebody listens, and then put back as they were.

    What the user had installed before is still called. The same signal again, some seconds after the first, does what
    it did without these handlers.

    A handler of Python runs only between two lines of the main thread, which may be inside a collective for long.
    So the system's handler also writes into a pipe at once, which threads of listeners read (``set_wakeup_fd``).
    Blocking the signals in all threads and taking them with ``sigwait`` would be as prompt, but OpenMP's and gloo's
    threads, which run already, do not block them, and child processes would.
    """

    def __init__(self) -> None:
        self._listeners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._previous: dict[int, Any] = {}
        self._first: dict[int, float] = {}
        self._first_read: dict[int, float] = {}
        self._pipe: tuple[int, int] | None = None
        self._masks = threading.local()
        self._is_known_to_fork = False

    def listen(self, listener: Listener) -> bool:
        """Tell ``listener``, held weakly, of requests; whether that is possible, which is so in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if not self._previous:
            self._install()
        elif not self._listeners:
            self._renew()
        if listener not in self._listeners:
            # It has not been told of anything, so what comes next is for it no signal that comes again.
            self._first.clear()
            self._first_read.clear()
        self._listeners.add(listener)
        return True

    def forget(self, listener: Listener) -> None:
        """Tell it no more; from any thread. Without listeners the signals do what they did before."""
        self._listeners.discard(listener)

    def ignore(self, listener: Listener) -> None:
        """Tell it no more; after the last listener all is as before. Its threads must not read the pipe any more."""
        self.forget(listener)
        if not self._listeners and threading.current_thread() is threading.main_thread():
            self._uninstall()

    @property
    def are_taken(self) -> bool:
        """Whether somebody listens."""
        return bool(self._previous) and bool(self._listeners)

    def descriptors(self) -> tuple[int, ...]:
        """What a thread can wait for, to call :meth:`pass_on` then."""
        return () if self._pipe is None else (self._pipe[0],)

    def pass_on(self) -> None:
        """Tell the listeners of signals that the system has delivered and Python has not handled yet."""
        if self._pipe is None:
            return
        try:
            numbers = os.read(self._pipe[0], 4096)
        except BlockingIOError:
            return
        now = time.monotonic()
        for number in set(numbers).intersection(_SIGNALS):
            if now - self._first_read.setdefault(number, now) < REPEAT_SECONDS:
                self._tell(number)
            elif self._previous.get(number) == signal.SIG_DFL:
                # Only the main thread sets handlers. It ends by it, unless it is stuck in a call that runs no Python.
                time.sleep(_STUCK_SECONDS)
                os._exit(128 + number)

    def _install(self) -> None:
        if hasattr(os, "register_at_fork") and not self._is_known_to_fork:
            os.register_at_fork(
                before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._after_fork_in_child
            )
            self._is_known_to_fork = True
        self._pipe = os.pipe()
        for descriptor in self._pipe:
            os.set_blocking(descriptor, False)
        others = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        if others != -1:
            # An event loop's. Then Python's own handlers have to do, which run a little later.
            signal.set_wakeup_fd(others)
        for number in _SIGNALS:
            self._take(number)

    def _renew(self) -> None:
        """Make what was left, when nobody listened any more, as good as new; signals of that time are nobody's."""
        for number in _SIGNALS:
            if signal.getsignal(number) != self._handle:
                self._take(number)
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(self._pipe[0], 4096)

    def _take(self, number: int) -> None:
        self._previous[number] = signal.signal(number, self._handle)
        if not callable(self._previous[number]) and hasattr(signal, "siginterrupt"):
            signal.siginterrupt(number, False)  # calls into the system go on, as if nothing had come

    def _uninstall(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()
        self._first.clear()
        self._first_read.clear()
        if self._pipe is not None:
            current = signal.set_wakeup_fd(-1)
            if current not in (-1, self._pipe[1]):
                signal.set_wakeup_fd(current)
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        is_again = now - self._first.setdefault(number, now) >= REPEAT_SECONDS
        previous = self._previous.get(number)
        if is_again or not self._listeners:
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
            if not callable(previous):
                os.kill(os.getpid(), number)
        else:
            self._tell(number)
        if callable(previous):
            previous(number, frame)

    def _tell(self, number: int) -> None:
        for listener in tuple(self._listeners):
            listener.asked(signal.Signals(number).name)

    # A child process, such as a worker of a DataLoader, is not the run: a signal to it alone means it alone, and does
    # what it did before. Until it is set up so, signals wait.

    def _before_fork(self) -> None:
        self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS) if self._previous else None

    def _after_fork(self) -> None:
        if self._masks.before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.before)

    def _after_fork_in_child(self) -> None:
        self._listeners.clear()
        if self._previous:
            self._uninstall()
        self._after_fork()


requests = _Requests()


def leave_to_parent() -> None:
    """Let this process, a worker of one that takes requests, not end by them; its parent tells it when to.

    Some signal all processes of a job at once (``timeout``, a kill of the process group), and a run whose workers are
    dead fails before it can save. A repeated signal ends a worker too, as that of a parent that has waited in vain.
    """
    first: dict[int, float] = {}

    def handle(number: int, _: Any) -> None:
        now = time.monotonic()
        if now - first.setdefault(number, now) >= REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in _SIGNALS:
        signal.signal(number, handle)
        if hasattr(signal, "siginterrupt"):
            signal.siginterrupt(number, False)
