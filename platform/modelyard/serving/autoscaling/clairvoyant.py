"""The fewest replica-hours that any controller could need which knew the whole trace: a lower bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from modelyard.errors import ModelyardError
from modelyard.serving.autoscaling.capacity import decode_work_s
from modelyard.serving.autoscaling.model import Objective
from modelyard.serving.autoscaling.replay import ReplicaModel
from modelyard.serving.autoscaling.traces import Trace


@dataclass(frozen=True)
class Bound:
    """A lower bound on the fleet."""

    replica_hours: float
    work_hours: float
    """The trace's work alone: what a fleet would need that is always full."""


def lower_bound(
    trace: Trace,
    model: ReplicaModel,
    objective: Objective,
    *,
    initial: int | None,
    min_replicas: int,
    missed_share: float = 0.0,
    bin_s: float = 1.0,
) -> Bound:
    """Least replica-hours over all controllers that miss at most this share of the objectives, by linear program.

    Every relaxation is in the controller's favour, so no replay can need less: replicas are divisible and work as if
    their batches were always full, any replica may do any part of any request, each prompt only has to be read by the
    limit for its first token, and answers by the latest time at which their mean pace still holds. The work that may be
    late at any moment is that of the heaviest requests that may be missed. A replica is paid from the decision on and
    works after its cold start; at the start there are the `initial` ones, or as many as
    it likes with None. Work whose limit is after the last
    arrival need not be done.

    Raises:
        ModelyardError: the solver found no plan.
    """
    end_s = trace.duration_s
    bins = max(1, int(np.ceil(end_s / bin_s)))
    arrival_s = np.array([one.arrival_s for one in trace.requests])
    prompt = np.array([one.prompt_tokens for one in trace.requests], dtype=float)
    output = np.array([one.output_tokens for one in trace.requests], dtype=float)
    read_s = prompt * model.capacity.prompt_token_s
    answer_s = output * decode_work_s(model.capacity, model.slots)
    first_s = arrival_s + objective.ttft_s + objective.ttft_per_1k_tokens_s * prompt / 1000
    last_s = first_s + output * objective.token_s
    heaviest = np.sort(read_s + answer_s)[::-1]
    may_be_late = float(heaviest[: int(missed_share * len(heaviest))].sum())

    def cumulated(at_s: np.ndarray, work: np.ndarray, late: int) -> np.ndarray:
        """Work by the end of each bin; `late` 1 puts an event at the end of its bin instead of the start."""
        index = np.floor(at_s / bin_s).astype(int) + late
        inside = index < bins
        return np.cumsum(np.bincount(index[inside], work[inside], minlength=bins))

    arrived = cumulated(arrival_s, read_s + answer_s, 0)
    due = cumulated(first_s, read_s, 1) + cumulated(last_s, answer_s, 1)
    due = np.maximum(0.0, due - may_be_late)

    # Variables, one of each for a bin: working replicas n, started ones u, work done by its end y. A start is paid from
    # the decision on and works `lead` bins later.
    lead = int(np.floor(model.cold_start_s / bin_s))
    one = sparse.identity(bins, format="csr")
    none = sparse.csr_matrix((bins, bins))
    difference = one - sparse.eye(bins, k=-1, format="csr")
    rows = [
        sparse.hstack([-bin_s * one, none, difference]),  # no more is done than there are replicas for
        sparse.hstack([difference, -sparse.eye(bins, k=-lead, format="csr"), none]),  # none works that was not started
    ]
    limits = np.zeros(2 * bins)
    limits[bins] = 1e9 if initial is None else initial
    paid = bin_s / 3600
    cost = np.concatenate([np.full(bins, paid), np.minimum(np.arange(bins, 0, -1), lead) * paid, np.zeros(bins)])
    replicas = [(min_replicas, None)] * bins + [(0, None)] * bins
    done = list(zip(due.tolist(), arrived.tolist(), strict=True))
    found = linprog(cost, A_ub=sparse.vstack(rows, format="csr"), b_ub=limits, bounds=replicas + done, method="highs")
    if found.status != 0:
        raise ModelyardError(f"the linear program of the clairvoyant bound ended with {found.message!r}")
    return Bound(float(found.fun), float((read_s + answer_s).sum() / 3600))
