"""Simulated time: rounds, restarts, failures, and the figures that come out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from modelyard.errors import CapacityError, ConfigError, DataError
from modelyard.scheduling.model import Decision, LinearSpeed, Reason, Request, Snapshot, Wait
from modelyard.scheduling.policies import policy
from modelyard.scheduling.simulator import GAVEL_RULES, Failures, Rules, Simulation
from modelyard.scheduling.traces.base import SteadyRun, Trace, TraceJob, cluster_of
from modelyard.scheduling.traces.generator import Generator


def entry(name: str, work: float, at: float = 0.0, workers: int = 1, restart_s: float = 0.0) -> TraceJob:
    request = Request(job_id=name, min_workers=workers, max_workers=workers, work=work, restart_s=restart_s)
    return TraceJob(request=request, submitted_s=at, begin=SteadyRun(work, LinearSpeed()).begin)


def trace(*jobs: TraceJob, pools: dict[str, tuple[int, int]] | None = None) -> Trace:
    return Trace(name="test", jobs=jobs, nodes=cluster_of(pools or {"p": (1, 2)}))


def run(work: Trace, rules: Rules | None = None, chosen: str = "fifo"):
    return Simulation(trace=work, policy=policy(chosen), rules=rules or Rules()).run()


def test_a_job_starts_at_the_next_round_and_ends_within_one():
    (job,) = run(trace(entry("a", 90, at=10))).jobs
    assert (job.started_s, job.finished_s, job.jct_s) == (60, 150, 140)


def test_a_restart_costs_time_with_the_gpus_held():
    result = run(trace(entry("a", 100, workers=2, restart_s=30)))
    (job,) = result.jobs
    assert job.finished_s == pytest.approx(30 + 50)
    assert (job.gpu_s, job.restart_gpu_s) == (pytest.approx(160), 60)


def test_gpus_of_a_finished_job_stay_reserved_to_the_end_of_the_round():
    first, second = run(trace(entry("a", 20, workers=2), entry("b", 20, workers=2))).jobs
    assert (first.finished_s, second.started_s) == (10, 60)


def test_by_gavels_rules_a_round_ends_with_its_last_job():
    first, second = run(trace(entry("a", 20, at=7, workers=2), entry("b", 20, at=7, workers=2)), GAVEL_RULES).jobs
    assert (first.finished_s, second.started_s) == (17, 17)


def test_idle_time_is_skipped():
    result = run(trace(entry("a", 10), entry("b", 10, at=100_000)))
    assert len(result.decisions_s) == 2
    assert result.jobs[1].started_s == 100_020


@dataclass
class Scripted:
    """Gives a prepared allocation at each decision."""

    steps: list[dict[str, dict[str, int]]]
    name: str = "scripted"
    seen: list[Snapshot] = field(default_factory=list)

    def decide(self, snapshot: Snapshot) -> Decision:
        self.seen.append(snapshot)
        run = self.steps[min(len(self.seen), len(self.steps)) - 1]
        return Decision(run, {j.job_id: Reason(Wait.BEHIND, "") for j in snapshot.jobs if j.job_id not in run})


def test_a_move_in_the_same_shape_is_free_by_sias_rules_and_else_a_restart():
    steps = [{"a": {"p-0000": 1}}, {"a": {"p-0001": 1}}]
    work = trace(entry("a", 100, restart_s=20), pools={"p": (2, 1)})
    ends = [
        Simulation(trace=work, policy=Scripted(steps), rules=Rules(moves_are_free=free)).run().jobs[0]
        for free in (True, False)
    ]
    assert [(job.finished_s, job.restarts) for job in ends] == [(120, 0), (140, 1)]


def test_a_policy_sees_progress_but_not_the_run():
    script = Scripted([{"a": {"p-0000": 1}}])
    Simulation(trace=trace(entry("a", 100)), policy=script).run()
    second = script.seen[1].jobs[0]
    assert (second.done, second.remaining, second.attained_gpu_s, second.restarts) == (60, 40, 60, 1)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"a": {"p-0000": 3}}, "outside its 1..1"),
        ({"a": {"p-0009": 1}}, "not usable"),
        ({"a": {"p-0000": 1}, "b": {"p-0000": 2}}, "3 GPU are handed out"),
    ],
)
def test_a_decision_that_no_cluster_could_carry_out_is_refused(step, words):
    with pytest.raises(DataError, match=words):
        Simulation(trace=trace(entry("a", 9), entry("b", 9, workers=2)), policy=Scripted([step])).run()


def test_a_job_that_can_never_start_ends_the_simulation_with_its_name():
    with pytest.raises(CapacityError, match="giant"):
        run(trace(entry("a", 10), entry("giant", 10, workers=3)))


def test_failures_are_seeded_cost_work_and_lose_no_job():
    work = trace(*(entry(f"j{n}", 3000, at=n) for n in range(6)), pools={"p": (2, 2)})
    rules = [Rules(failures=Failures(mean_between_s=2000, repair_s=300, lost_s=100, seed=seed)) for seed in (1, 1, 2)]
    ends = [[job.finished_s for job in run(work, one).jobs] for one in rules]
    assert ends[0] == ends[1] != ends[2]
    assert max(ends[0]) > run(work).jobs[-1].finished_s
    assert all(len(found) == 6 for found in ends)


def test_the_figures_follow_from_the_jobs():
    result = run(trace(entry("a", 60), entry("b", 120)))
    assert result.avg_jct_h == pytest.approx(90 / 3600)
    assert result.makespan_h == pytest.approx(120 / 3600)
    assert result.jct_h(0.5) == pytest.approx(90 / 3600)
    assert result.utilization == pytest.approx((2 + 1) * 60 / (2 * 120))


def test_fairness_compares_with_an_equal_share_of_the_cluster_alone():
    work = trace(entry("a", 60), entry("b", 60), pools={"p": (1, 1)})
    fair = run(work).fairness(work)
    assert fair["a"] == pytest.approx(60 / 120), "first of two jobs on one GPU"
    assert fair["b"] == pytest.approx(120 / (60 / (1 / 1.5))), "it shared half of its life"


def test_the_same_inputs_give_the_same_result():
    work = Generator(num_jobs=25, seed=4).trace()
    first, second = (run(work) for _ in range(2))
    assert replace(first, decisions_s=()) == replace(second, decisions_s=())


def test_a_round_without_length_is_refused():
    with pytest.raises(ConfigError, match="round_s"):
        Rules(round_s=0)
