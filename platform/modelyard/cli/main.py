"""The `modelyard` entry point: commands loaded lazily, and the one place where errors become exit codes.

0 done; 1 something failed; 2 the input is wrong; 130 interrupted. `MODELYARD_DEBUG=1` shows tracebacks.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import click
from click.shell_completion import CompletionItem

from modelyard import __version__
from modelyard.errors import InputError, ModelyardError, nearest

ENV_DEBUG = "MODELYARD_DEBUG"
"""Set to 1 to see the traceback of every error."""


class Entry(NamedTuple):
    """Where a command lives, and its help line, so that `--help` need not import it."""

    target: str
    """`module:attribute`."""
    help: str
    added: Mapping[str, str] = {}
    """Sub-commands that other modules put into this group: name -> `module:attribute`."""


COMMANDS: dict[str, Entry] = {
    "backup": Entry("modelyard.cli.backup:backup", "Back up, verify and restore registry, artifacts and journal."),
    "certs": Entry("modelyard.cli.certs:certs", "Make and rotate the cluster's certificates and its token."),
    "cluster": Entry("modelyard.cli.cluster:cluster", "Check cluster files: labels, machines, what jobs could get."),
    "completion": Entry("modelyard.cli.completion:completion", "Print the completion script of a shell."),
    "compress": Entry("modelyard.cli.compress:compress_command", "Make a model smaller and faster, and register it."),
    "data": Entry("modelyard.cli.data:data", "Prepare and inspect datasets."),
    "doctor": Entry("modelyard.cli.doctor:doctor", "Check this machine and say what to do."),
    "down": Entry("modelyard.cli.up:down", "Stop the cluster that `up` started."),
    "drain": Entry("modelyard.cli.drain:drain", "Empty a node: jobs checkpoint and move, replicas move."),
    "evaluate": Entry("modelyard.cli.evaluate:evaluate", "Measure a model on held-out data."),
    "keys": Entry("modelyard.cli.keys:keys", "Make, list and revoke the API keys of served models."),
    "models": Entry(
        "modelyard.cli.models:models",
        "List, show, verify, promote and compare models.",
        {"compare": "modelyard.cli.compare:compare"},
    ),
    "pools": Entry("modelyard.cli.pools:pools", "Show the pools: nodes, accelerators, who holds what."),
    "predict": Entry("modelyard.cli.predict:predict_command", "Ask a registered model."),
    "queue": Entry("modelyard.cli.queue:queue", "Show and steer the jobs that wait and run."),
    "quota": Entry("modelyard.cli.quota:quota", "Show and set what tenants may hold."),
    "scheduler": Entry("modelyard.cli.scheduler:scheduler", "Start, stop and repair the cluster's scheduler."),
    "serve": Entry(
        "modelyard.cli.serve:serve",
        "Serve models behind an OpenAI-compatible gateway.",
        {"cascade": "modelyard.cli.cascade:cascade"},
    ),
    "simulate": Entry("modelyard.cli.simulate:simulate", "Replay a workload through scheduling policies."),
    "status": Entry("modelyard.cli.up:status", "Show the cluster that `up` started: nodes, pools, dashboard."),
    "submit": Entry("modelyard.cli.submit:submit", "Run a job on a cluster and follow it."),
    "train": Entry("modelyard.cli.train:train_command", "Train a model and register it."),
    "tune": Entry("modelyard.cli.tune:tune_group", "Search over fields of a training config; show and resume studies."),
    "up": Entry("modelyard.cli.up:up", "Start a cluster: on this laptop, or from a cluster file."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command runs."""

    def __init__(self, *args: Any, entries: Mapping[str, Entry], **others: Any) -> None:
        super().__init__(*args, **others)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in alphabetical order."""
        return sorted(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command `cmd_name`; None when there is no such command."""
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        command = _imported(entry.target)
        if isinstance(command, click.Group):
            for name, target in entry.added.items():
                if name not in command.commands:
                    command.add_command(_imported(target), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, with the nearest known command in the refusal of an unknown one."""
        name = args[0]
        if name not in self.entries and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"no such command {name!r}; {nearest(name, self.entries)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in `--help`, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.entries[name].help) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete command names from the table, options as usual."""
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        return [CompletionItem(name, help=self.entries[name].help) for name in names]


def _imported(target: str) -> click.Command:
    module, _, attribute = target.partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command), f"{target} is not a click command"
    return command


@click.group(cls=LazyGroup, entries=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="modelyard")
def modelyard() -> None:
    """Train, evaluate and register large models on one Ray cluster of unlike machines."""


def main() -> NoReturn:
    """The `modelyard` console script."""
    run(modelyard, prog_name="modelyard")


def run(command: click.Command, args: Sequence[str] | None = None, prog_name: str | None = None) -> NoReturn:
    """Run a command as a whole program and exit; used by `modelyard` and by every script in `jobs/`.

    Args:
        command: the click command; it returns None, or an int that becomes the exit code.
        args: the words after the program's name; those of this process by default.
        prog_name: the name shown in usage lines; the script's by default.
    """
    sys.exit(_exit_code(command, args, prog_name))


def _exit_code(command: click.Command, args: Sequence[str] | None, prog_name: str | None) -> int:
    try:
        result = command.main(args, prog_name, standalone_mode=False)
    except click.ClickException as error:
        _debug_traceback()
        error.show()
        return error.exit_code
    except click.Abort as error:  # click's name for Ctrl-C, and for the end of input at a prompt
        click.echo("interrupted", err=True)
        return 130 if isinstance(error.__cause__, KeyboardInterrupt) else 1
    except ModelyardError as error:
        _debug_traceback()
        cause = getattr(error, "cause", error)  # raised in a Ray task it arrives wrapped, and prints a remote traceback
        click.echo(click.style("error: ", fg="red", bold=True) + str(cause), err=True)
        return 2 if isinstance(error, InputError) else 1
    return result if type(result) is int else 0


def _debug_traceback() -> None:
    if os.environ.get(ENV_DEBUG, "") not in ("", "0"):
        traceback.print_exc()
