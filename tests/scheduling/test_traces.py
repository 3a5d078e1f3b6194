"""Readers of traces: what they give, and how they refuse corrupt lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelyard.errors import DataError, NotFoundError
from modelyard.scheduling.traces import gavel, jsonl, philly, rubick, sia
from modelyard.scheduling.traces.generator import Generator

RATES = {
    "v100": {"('Net (batch size 8)', 2)": {"null": 20.0, "('Net (batch size 8)', 2)": [9.0, 9.0]}},
    "k80": {"('Net (batch size 8)', 2)": {"null": 5.0}},
    "k80_unconsolidated": {"('Net (batch size 8)', 2)": {"null": 1.0}},
}
GAVEL_LINE = "Net (batch size 8)\tpython3 main.py\tdir\t--num_steps\t1\t7200\t2\t1\t-1.0\t30\n"


def gavel_files(folder: Path, text: str = GAVEL_LINE) -> tuple[Path, Path]:
    (folder / "t.trace").write_text(text)
    (folder / "rates.json").write_text(json.dumps(RATES))
    return folder / "t.trace", folder / "rates.json"


def test_gavel_gives_rigid_jobs_and_their_measured_rates(tmp_path):
    trace = gavel.read(*gavel_files(tmp_path))
    (job,) = trace.jobs
    assert (job.request.min_workers, job.request.max_workers, job.request.work, job.submitted_s) == (2, 2, 7200, 30)
    speed = job.begin().speed
    assert [speed.goodput(pool, 2, 1) for pool in ("v100", "k80", "p100")] == [20, 5, 0]
    assert speed.goodput("k80", 2, 2) == 5, "Gavel's simulator knows no other rate"


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [("7200", "many", "total_steps"), ("\t2\t1\t", "\t0\t1\t", "scale_factor"), ("\t30", "", "arrival_s")],
)
def test_a_corrupt_line_names_file_line_and_field(tmp_path, old, new, field):
    files = gavel_files(tmp_path, GAVEL_LINE + GAVEL_LINE.replace(old, new))
    with pytest.raises(DataError, match=rf"t\.trace, line 2: field '{field}'"):
        gavel.read(*files)


def test_an_unknown_job_type_is_refused_with_the_nearest_known(tmp_path):
    files = gavel_files(tmp_path, GAVEL_LINE.replace("Net (", "Nett ("))
    with pytest.raises(DataError, match=r"did you mean 'Net \(batch size 8\)'"):
        gavel.read(*files)


def test_a_trace_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.jsonl"):
        jsonl.read(tmp_path / "none.jsonl")


def sia_files(folder: Path, workload: str = "name,time,application\nnet-0,12,net\n") -> Path:
    model = folder / "traces" / "net"
    model.mkdir(parents=True)
    for gpu, speed in (("a", 1.0), ("b", 2.0)):
        rows = [
            (p, b, speed * (0.1 + b / 1000) + 0.02 * (p != "1"), 0.02 * (p != "1"))
            for p in ("1", "2", "4", "22")
            for b in (32, 128)
        ]
        (model / f"placements-{gpu}.csv").write_text(
            "placement,local_bsz,step_time,sync_time\n" + "".join(f"{p},{b},{s},{y}\n" for p, b, s, y in rows)
        )
        (model / f"scalability-{gpu}.csv").write_text(
            "num_nodes,num_replicas,local_bsz,step_time,sync_time\n"
            + "".join(
                f"{n},{r},{b},{speed * (0.1 + b / 1000) + 0.05},0.05\n"
                for n, r in ((1, 1), (4, 16), (8, 8))
                for b in (32, 128)
            )
        )
    for batch in (64, 512):
        (model / f"validation-{batch}.csv").write_text(
            "progress,iteration,metric,grad_sqr,grad_var\n" + "".join(f"{100 * e},{e},0,1,{batch}\n" for e in (1, 2, 3))
        )
    (folder / "w-1.csv").write_text(workload)
    return folder / "w-1.csv"


def test_sia_hides_the_truth_until_a_job_has_run(tmp_path):
    path = sia_files(tmp_path)
    trace = sia.read(path, sia.read_models(tmp_path / "traces", ["a", "b"]), {"a": (1, 4), "b": (1, 4)})
    run = trace.jobs[0].begin()
    assert trace.jobs[0].request.work is None
    assert run.speed.goodput("a", 1, 1) > run.speed.goodput("b", 1, 1)
    assert run.speed.goodput("a", 2, 1) == 0, "nothing was measured yet"
    run.place("a", [1])
    run.advance(5.0)
    assert run.speed.goodput("a", 2, 1) > run.speed.goodput("a", 1, 1) > 0


def test_a_sia_job_ends_with_its_last_epoch_and_sooner_on_more_gpus(tmp_path):
    path = sia_files(tmp_path)
    trace = sia.read(path, sia.read_models(tmp_path / "traces", ["a", "b"]), {"a": (1, 4), "b": (1, 4)})
    took = {}
    for counts in ((1,), (4,)):
        run = trace.jobs[0].begin()
        run.place("a", counts)
        took[counts] = run.advance(1e6)
        assert run.is_finished
        assert run.done == 300
    assert took[(4,)] < took[(1,)]


def test_sia_names_an_application_without_profiles(tmp_path):
    path = sia_files(tmp_path, "name,time,application\nx-0,12,other\n")
    with pytest.raises(DataError, match=r"line 2: field 'application' is 'other'; known: net"):
        sia.read(path, sia.read_models(tmp_path / "traces", ["a", "b"]))


def test_rubick_runs_the_fastest_plan_that_was_measured(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "placements.csv").write_text(
        "exec_plan,placement,iter_time\nga,4,0.5\nzero-dp,4,0.25\n141,4,0\nga,22,1\n"
    )
    (tmp_path / "w.csv").write_text("name,submission_time,application,num_gpus,exec_plan,steps\nnet-0,5,net,4,ga,100\n")
    plans = rubick.read_plans(tmp_path)
    assert plans["net"].goodput("a800", 4, 1) == 4
    assert plans["net"].plan(4, 1) == "zero-dp"
    assert plans["net"].goodput("a800", 4, 2) == 1
    (job,) = rubick.read(tmp_path / "w.csv", plans).jobs
    assert (job.request.min_workers, job.request.restart_s, job.request.work) == (4, 260, None)


PHILLY = {
    "jobid": "application_1",
    "vc": "team",
    "submitted_time": "2017-10-09 07:00:00",
    "attempts": [
        {"start_time": "2017-10-09 07:10:00", "end_time": "2017-10-09 07:20:00", "detail": [{"gpus": ["0", "1"]}]},
        {"start_time": None, "end_time": None, "detail": []},
    ],
}


def test_philly_gives_rigid_jobs_of_the_time_they_ran(tmp_path):
    idle = PHILLY | {"jobid": "application_2", "attempts": []}
    (tmp_path / "cluster_job_log").write_text(json.dumps([PHILLY, idle], indent=1))
    (job,) = philly.read(tmp_path / "cluster_job_log").jobs
    assert (job.request.tenant, job.request.min_workers, job.request.work) == ("team", 2, 600)
    run = job.begin()
    run.place("default", [2])
    assert run.advance(3600) == pytest.approx(600)


def test_philly_names_the_line_of_a_corrupt_job(tmp_path):
    broken = PHILLY | {"submitted_time": "yesterday"}
    text = json.dumps([PHILLY, broken], indent=1)
    (tmp_path / "log").write_text(text)
    line = [n for n, words in enumerate(text.splitlines(), 1) if '"jobid"' in words][1]
    with pytest.raises(DataError, match=rf"log, line {line}: field 'submitted_time' is 'yesterday'"):
        philly.read(tmp_path / "log")


def test_our_own_format_comes_back_as_it_was_written(tmp_path):
    jobs = [{"job": "a", "submit_s": 0, "work": 60, "speed": {"x": 2}, "min": 1, "max": 4, "priority": 5}]
    jsonl.write(tmp_path / "t.jsonl", jobs, {"x": (2, 4)})
    trace = jsonl.read(tmp_path / "t.jsonl")
    assert len(trace.nodes) == 2
    assert (trace.jobs[0].request.max_workers, trace.jobs[0].request.priority) == (4, 5)
    assert trace.jobs[0].begin().speed.goodput("x", 2, 1) == 4


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"job": "b", "submit_s": 0}', "work"),
        ('{"job": "b", "submit_s": -1, "work": 1}', "submit_s"),
        ('{"job": "b", "submit_s": 0, "work": 1, "mni": 2}', "mni"),
        ('{"job": "b", "submit_s": 0, "work": 1, "min": 4, "max": 2}', "job"),
        ('{"job": "b", "submit_s"', "job"),
    ],
)
def test_a_corrupt_line_of_our_own_format_is_named(tmp_path, line, field):
    (tmp_path / "t.jsonl").write_text('{"job": "a", "submit_s": 0, "work": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"t\.jsonl, line 2: field '{field}'"):
        jsonl.read(tmp_path / "t.jsonl")


def test_two_jobs_of_one_name_are_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"job": "a", "submit_s": 0, "work": 1}\n' * 2)
    with pytest.raises(DataError, match="two jobs are named 'a'"):
        jsonl.read(tmp_path / "t.jsonl")


def test_the_generator_gives_the_same_for_a_seed_and_what_it_documents():
    one, same, other = (Generator(num_jobs=400, seed=seed).trace() for seed in (1, 1, 2))
    key = [(job.request, job.submitted_s) for job in one.jobs]
    assert key == [(job.request, job.submitted_s) for job in same.jobs]
    assert key != [(job.request, job.submitted_s) for job in other.jobs]
    assert one.jobs[-1].submitted_s == pytest.approx(400 / 20 * 3600, rel=0.2)
    assert sum(job.request.max_workers == 2 for job in one.jobs) / 400 == pytest.approx(0.6, abs=0.08)
    works = sorted(job.request.work or 0 for job in one.jobs)
    assert works[200] == pytest.approx(0.5 * 3600, rel=0.3)
