"""`modelyard queue`: who waits, who runs, why, and a hand on it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import tables

if TYPE_CHECKING:
    from rich.table import Table


@click.group(invoke_without_command=True)
@click.option("--watch", is_flag=True, help="Show it anew every second until Ctrl-C.")
@click.option("--all", "show_all", is_flag=True, help="Also what is over.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def queue(context: click.Context, watch: bool, show_all: bool, as_json: bool) -> None:
    """Show the jobs that wait and run: state, place in line, lease, and the reason when waiting."""
    if context.invoked_subcommand is not None:
        return
    if watch:
        _watch(show_all)
        return
    rows, failure = _rows(show_all)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        tables.console().print(_table(rows))
    if failure:
        click.echo(f"the last scheduling round failed: {failure}", err=True)


@queue.command()
@click.argument("job")
def explain(job: str) -> None:
    """Say why JOB waits or must yield, in numbers, and what would let it start."""
    service, actor = _service()
    snapshot, entries, answers, reasons, failure = service.call(actor.look)
    if job not in entries:
        from modelyard.errors import NotFoundError, nearest

        raise NotFoundError(f"there is no job {job!r} in the queue", nearest(job, entries))
    entry, answer, reason = entries[job], answers[job], reasons.get(job)
    request = entry.request
    click.echo(f"job        {job}, tenant {request.tenant}, priority {request.priority}")
    click.echo(f"asks for   {_asked(request)}")
    click.echo(f"state      {entry.status}{_place(job, entries)}")
    if entry.allocation:
        click.echo(f"holds      {_held(entry.allocation, snapshot)} (lease {entry.epoch})")
    if answer.must_yield:
        left = max((answer.yield_by_s or 0.0) - time.time(), 0.0)
        click.echo(f"must yield within {left:.0f} s: {answer.reason}")
    elif reason is not None and not entry.status.is_over:
        click.echo(f"waits      {reason.text}")
        if reason.remedy:
            click.echo(f"  -> {reason.remedy}")
        if not entry.is_held:
            start_s = _expected(service, actor, snapshot).get(job)
            click.echo(f"starts     {'nobody knows when' if start_s is None else _in(start_s)}, if nothing new comes")
    elif str(entry.status) == "waiting":
        click.echo("waits      it was just submitted; the next round, within a second, looks at it")
    if (noise := service.call(actor.noise, job)) is not None and noise.sqr > 0 and noise.var > 0:
        batch = entry.measured[-1].global_batch if entry.measured else 0
        click.echo(
            f"gradients  noise scale {noise.var / noise.sqr:.1f} batches of {batch}; a step with twice the batch would "
            f"be worth {float(noise.gain(2.0)):.2f} steps"
        )
    if failure:
        click.echo(f"the last scheduling round failed: {failure}")


@queue.command()
@click.argument("job")
def cancel(job: str) -> None:
    """Take JOB out of the line; a running one stops at its next step boundary."""
    before = str(_tell("cancel", job))
    said = {"running": "is cancelled and stops at its next step boundary", "waiting": "is cancelled"}
    click.echo(f"{job} {said.get(before, f'was over already: {before}')}")


@queue.command()
@click.argument("job")
def hold(job: str) -> None:
    """Keep JOB in line without starting it; a running one gives its lease back."""
    _tell("hold", job, True)
    click.echo(f"{job} is on hold")


@queue.command()
@click.argument("job")
def release(job: str) -> None:
    """Let a held JOB start again."""
    _tell("hold", job, False)
    click.echo(f"{job} may start")


@queue.command()
@click.argument("job")
@click.argument("priority", type=int)
def priority(job: str, priority: int) -> None:
    """Set JOB's priority (-1000..1000; higher goes first)."""
    _tell("set_priority", job, priority)
    click.echo(f"{job} has priority {priority}")


def _rows(show_all: bool) -> tuple[list[dict[str, Any]], str]:
    """A row for each job, and what the last round failed of."""
    service, actor = _service()
    snapshot, entries, answers, reasons, failure = service.call(actor.look)
    starts = _expected(service, actor, snapshot)
    waiting = [job for job, entry in entries.items() if str(entry.status) == "waiting"]
    rows = []
    for job, entry in entries.items():
        if entry.status.is_over and not show_all:
            continue
        answer, reason = answers[job], reasons.get(job)
        rows.append(
            {
                "job": job,
                "tenant": entry.request.tenant,
                "priority": entry.request.priority,
                "state": "held" if entry.is_held else str(entry.status),
                "place": waiting.index(job) + 1 if job in waiting else None,
                "lease": _held(entry.allocation, snapshot),
                "for_s": round(time.time() - (entry.changed_s or entry.submitted_s)),
                "starts_in_s": round(max(starts[job] - time.time(), 0.0)) if job in starts and job in waiting else None,
                "reason": answer.reason or (reason.text if reason and not entry.status.is_over else ""),
            }
        )
    return rows, failure


def _table(rows: list[dict[str, Any]], failure: str = "") -> Table:
    table = tables.table("job", "tenant", "priority", "state", "place", "lease", "for", "starts in", "reason")
    for row in rows:
        cells = [row["job"], row["tenant"], str(row["priority"]), row["state"], str(row["place"] or "-")]
        starts = "-" if row["starts_in_s"] is None else _span(row["starts_in_s"])
        tables.add_row(table, *cells, row["lease"] or "-", _span(row["for_s"]), starts, row["reason"] or "-")
    if failure:
        table.caption = f"the last scheduling round failed: {failure}"
    return table


def _watch(show_all: bool) -> None:
    from rich.live import Live

    with Live(_table(*_rows(show_all)), console=tables.console(), auto_refresh=False) as live:
        while True:
            time.sleep(1.0)
            live.update(_table(*_rows(show_all)), refresh=True)


def _tell(method: str, *arguments: Any) -> Any:
    service, actor = _service()
    return service.call(getattr(actor, method), *arguments)


def _service() -> tuple[Any, Any]:
    from modelyard.cluster import connect_existing
    from modelyard.scheduling import service

    connect_existing()
    return service, service.required()


def _expected(service: Any, actor: Any, snapshot: Any) -> dict[str, float]:
    """Waiting jobs to the time of their start, as far as it can be foretold; computed here, not in the scheduler."""
    from modelyard.scheduling.outlook import expected_starts
    from modelyard.scheduling.policies import policy

    return expected_starts(snapshot, policy(service.call(actor.ping)))


def _in(at_s: float) -> str:
    return f"in about {_span(max(at_s - time.time(), 0.0))}"


def _span(seconds: float) -> str:
    """`41 s`, `12 min`, `3.5 h`, `2.1 d`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def _asked(request: Any) -> str:
    workers = f"{request.min_workers}..{request.max_workers}"
    if request.min_workers == request.max_workers:
        workers = str(request.max_workers)
    each = ", ".join(f"{amount:g} {name}" for name, amount in request.resources.items() if amount)
    return f"{workers} workers of {each} in {', '.join(request.pools) or 'any pool'}"


def _held(allocation: Any, snapshot: Any) -> str:
    from modelyard.scheduling.model import pool_of

    pools: dict[str, int] = {}
    for node, count in allocation.items():
        pool = pool_of(snapshot.node_by_id[node]) if node in snapshot.node_by_id else "gone"
        pools[pool] = pools.get(pool, 0) + count
    return ", ".join(f"{count} in {pool}" for pool, count in sorted(pools.items()))


def _place(job: str, entries: Any) -> str:
    waiting = [name for name, entry in entries.items() if str(entry.status) == "waiting"]
    return f", {waiting.index(job) + 1} of {len(waiting)} in line" if job in waiting else ""
