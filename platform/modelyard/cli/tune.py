"""`modelyard tune FILE | show | best | resume | plot`, and what `jobs/tune.py` runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from modelyard.cli.options import config_options
from modelyard.cli.tables import add_row, console, table
from modelyard.config import Config

if TYPE_CHECKING:
    from modelyard.tuning import Study, StudyConfig


def _config_type() -> type[Config]:
    from modelyard.tuning.config import StudyConfig

    return StudyConfig


class _FileOrCommand(click.Group):
    """`tune FILE` and `tune --config FILE` run a study; any other first word is a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the hidden command `run` before a file or an option."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            is_file = not args[0].startswith("-")
            if is_file and "." not in args[0] and "/" not in args[0]:
                return super().parse_args(ctx, args)  # a misspelt command: click says so
            args = ["run", *(["--config", args[0]] if is_file else args[:1]), *args[1:]]
        return super().parse_args(ctx, args)


@click.group("tune", cls=_FileOrCommand)
def tune_group() -> None:
    """Search over fields of a training config: modelyard tune FILE [--trials=8 ...]"""


@tune_group.command("run", hidden=True)
@config_options(_config_type)
def run_command(config: StudyConfig) -> None:
    """Run the study of a config file, and register its best model."""
    from modelyard.tuning import tune

    show_study(tune(config))


@tune_group.command("resume")
@click.argument("study")
@click.option("--failed", is_flag=True, help="Run failed trials again.")
def resume_command(study: str, failed: bool) -> None:
    """Go on with a study that was cut off; trials that are over stay."""
    from modelyard.tuning import resume

    show_study(resume(study, failed=failed))


@tune_group.command("show")
@click.argument("study")
def show_command(study: str) -> None:
    """Show the trials of a study, running or over."""
    from modelyard.tuning import tables
    from modelyard.tuning.study import StudyFolder, spent_steps

    folder = StudyFolder(study)
    config, trials, outcome = folder.record().config, folder.trials(), folder.outcome()
    shown = table(*tables.columns(trials, config.objectives))
    for row in tables.rows(trials, config.objectives):
        add_row(shown, *row)
    console().print(shown)
    for reason in tables.failures(trials):
        click.echo(reason)
    state = "over" if outcome is not None else "not over; `modelyard tune resume` goes on with it"
    click.echo(f"study {study}: {len(trials)} trials, {spent_steps(trials):,} steps, {state}")
    if outcome is not None and outcome.model is not None:
        click.echo(f"model {outcome.model}")


@tune_group.command("best")
@click.argument("study")
def best_command(study: str) -> None:
    """Print the best trial (or the Pareto front) as overrides for `modelyard train`."""
    from modelyard.errors import NotFoundError
    from modelyard.tuning import tables
    from modelyard.tuning.study import StudyFolder, best

    folder = StudyFolder(study)
    config, outcome = folder.record().config, folder.outcome()
    found = best(folder.trials(), config.objectives)
    if not found:
        raise NotFoundError(f"study {study!r} has no trial with a figure yet", "see `modelyard tune show`")
    for trial in found:
        click.echo(tables.line(trial, config.objectives))
        click.echo(" ".join(f"--{name}={_yaml(value)}" for name, value in trial.params.items()))
    if outcome is not None and outcome.model is not None:
        click.echo(f"model {outcome.model}")


@tune_group.command("plot")
@click.argument("study")
@click.option("--out", type=click.Path(file_okay=False), help="Folder for the PNG files.")
def plot_command(study: str, out: str | None) -> None:
    """Draw a study: parallel coordinates, importance, curves."""
    from pathlib import Path

    from modelyard.tuning.report import pictures
    from modelyard.tuning.study import StudyFolder

    folder = StudyFolder(study)
    drawn = pictures(study, folder.record().config, folder.trials(), Path(out) if out else None)
    for path in (drawn.parallel, drawn.importance, drawn.curves):
        if path is not None:
            click.echo(path)


def show_study(study: Study) -> None:
    """Print what a study found."""
    from modelyard.tuning import tables
    from modelyard.tuning.study import TrialStatus, spent_steps

    count = {status: sum(trial.status is status for trial in study.trials) for status in TrialStatus}
    click.echo(
        f"study      {study.name}, {len(study.trials)} trials ({count[TrialStatus.STOPPED]} stopped early, "
        f"{count[TrialStatus.FAILED]} failed), {spent_steps(study.trials):,} steps, {study.elapsed_s:.0f} s"
    )
    for trial in study.best:
        click.echo(f"best       {tables.line(trial, study.config.objectives)}")
    if study.model is not None:
        click.echo(f"model      {study.model}")
    for name in ("parallel", "importance", "curves"):
        path = getattr(study.pictures, name)
        if path is not None:
            click.echo(f"{name:<10} {path}")


def _yaml(value: Any) -> str:
    import json

    text = value if isinstance(value, str) else json.dumps(value)
    return f"'{text}'" if " " in text else text
