"""One MLflow run per trial, written by the driver on a thread of its own once the trial is over."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

from modelyard.errors import ModelyardError
from modelyard.observability.tracking import Tracker
from modelyard.tuning.config import StudyConfig
from modelyard.tuning.study import Trial, TrialStatus

if TYPE_CHECKING:
    from modelyard.tuning.recorder import Recorder

logger = logging.getLogger(__name__)


class Tracking:
    """Sends finished trials to MLflow; a context manager that waits for the last ones."""

    def __init__(self, config: StudyConfig) -> None:
        self._config = config
        self._recorder: Recorder | None = None
        self._sent: dict[str, Future[None]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")

    def writes_to(self, recorder: Recorder) -> None:
        """Note the ids of the MLflow runs there."""
        self._recorder = recorder

    def on_trial(self, trial: Trial) -> None:
        """Called at every change of a trial."""
        if trial.is_over and trial.tracking_run_id is None and trial.trial_id not in self._sent:
            self._sent[trial.trial_id] = self._thread.submit(self._send, trial)

    def __enter__(self) -> Self:
        if self._recorder is not None:
            for trial in self._recorder.trials():  # what an earlier driver did not come to send
                self.on_trial(trial)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=kind is None, cancel_futures=kind is not None)

    def _send(self, trial: Trial) -> None:
        try:
            tags = {"modelyard.study": self._config.name, "modelyard.trial": trial.trial_id}
            name = trial.run_id or f"{self._config.name}-{trial.trial_id}"
            tracker = Tracker.start(self._config.name, name, {**trial.params, "status": trial.status.value}, tags)
            for rung in trial.rungs:
                tracker.log(rung.step, rung.metrics)
            tracker.finish("FAILED" if trial.status is TrialStatus.FAILED else "FINISHED")
        except ModelyardError as error:
            logger.warning("trial %s is not in MLflow: %s", trial.trial_id, error)
            return
        assert self._recorder is not None
        self._recorder.tracked(trial.trial_id, tracker.run_id)
