"""Stopping a gang or a driver on purpose, and making one message out of a gang's errors."""

from __future__ import annotations

import logging
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from modelyard.errors import ModelyardError, TrainingError

logger = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 30.0
"""Longest wait for the workers' last checkpoint when the driver is told to end."""
T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818 - not an error: the run goes on with another gang
    """Raised by every worker after a checkpoint at a step boundary, to be started again at once."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(reason, step)
        self.reason = reason
        self.step = step

    def __str__(self) -> str:
        return f"interrupted at step {self.step}: {self.reason}"


def interruptible(call: Callable[[], T], leave: Callable[[], None]) -> T:
    """`call()` on a thread, so that Ctrl-C and SIGTERM reach this one: then `leave()` is asked to end the call.

    Ray Train's own handler of Ctrl-C ends the process on the spot. A second signal does not wait any longer.

    Raises:
        KeyboardInterrupt: a signal came; the call has ended, or `LEAVE_TIMEOUT_S` is over.
    """
    outcome: dict[str, Any] = {}
    over = threading.Event()  # not Thread.join: interrupted once, it takes a running thread for an ended one

    def run() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            outcome["error"] = error
        over.set()

    threading.Thread(target=run, name="fit", daemon=True).start()
    try:
        with terminated_as_interrupted():
            while not over.wait(0.5):
                pass
    except KeyboardInterrupt:
        logger.warning("interrupted: the workers write a last checkpoint (again to leave at once)")
        leave()
        over.wait(LEAVE_TIMEOUT_S)
        logger.warning("the same command goes on at the newest checkpoint")
        raise
    if "error" in outcome:
        raise outcome["error"]
    value: T = outcome["value"]
    return value


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM, which Slurm, Kubernetes and systemd send, as Ctrl-C. Only the main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def original_error(error: BaseException) -> BaseException:
    """The exception the worker raised, out of Ray Train's and Ray's wrappers."""
    for attribute in ("_base_exc", "health_check_failure", "cause"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            return original_error(inner)
    return error


def grouped(worker_failures: Mapping[int, BaseException]) -> ModelyardError:
    """One error for all ranks: equal failures are told once, with the ranks that had them.

    A failure that other ranks only suffered (a broken connection to a dead peer) is left out when another rank
    has a cause of its own. When every cause is one and the same Modelyard error, that error itself comes back.
    """
    causes = {rank: original_error(error) for rank, error in sorted(worker_failures.items())}
    own = {rank: cause for rank, cause in causes.items() if not _is_collateral(cause)} or causes
    first = next(iter(own.values()))
    if isinstance(first, ModelyardError) and all(_signature(cause) == _signature(first) for cause in own.values()):
        return first
    by_signature: dict[str, list[int]] = {}
    for rank, cause in own.items():
        by_signature.setdefault(_signature(cause), []).append(rank)
    lines = [f"{_ranks(ranks)}: {_told(own[ranks[0]])}" for ranks in by_signature.values()]
    silent = sorted(causes.keys() - own.keys())
    if silent:
        lines.append(f"{_ranks(silent)}: lost the connection to the workers above")
    return TrainingError("training failed on its workers\n" + "\n".join(lines))


_COLLATERAL = re.compile(r"connection (closed|reset|refused)|broken pipe|socket|gloo|process group|timed out", re.I)


def _is_collateral(error: BaseException) -> bool:
    return isinstance(error, RuntimeError | OSError) and bool(_COLLATERAL.search(str(error)))


def _signature(error: BaseException) -> str:
    return f"{type(error).__name__}: {re.sub(r'[0-9]+', '#', str(error))}"


def _told(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return "\n  ".join([f"{type(error).__name__}: {text}", *getattr(error, "__notes__", ())])


def note_place(error: BaseException) -> None:
    """Write where an error was raised into its notes: Ray drops tracebacks between processes, notes survive."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        error.add_note(f"at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}")


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
