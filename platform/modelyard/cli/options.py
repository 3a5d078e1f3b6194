"""Options that commands share: a config from a YAML file plus dotted overrides, the same way everywhere.

@click.command()
@config_options(lambda: TrainConfig)
def train(config: TrainConfig) -> None: ...

train --config tiny.yaml --training.max_steps=200 --name trial --print-config
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import click

from modelyard import config as configs
from modelyard.errors import ConfigError


class Seconds(click.FloatRange):
    """A length of time: a finite number above 0, or 0 itself when `from_zero`."""

    name = "seconds"

    def __init__(self, *, from_zero: bool = False) -> None:
        super().__init__(min=0, min_open=not from_zero)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As click, but `nan` and `inf` are no lengths of time."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number of seconds.", param, ctx)
        return number


def config_options(
    config_type: Callable[[], type[configs.Config]], file_option: str = "--config"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command `--config FILE`, `--print-config`, `--section.field=value` (or `--section.field VALUE`).

    The command function receives the loaded config as the keyword `config`. With `--print-config` it is not
    called: the config is printed as YAML with every default filled in. A command's own positional arguments
    go before the overrides.

    Args:
        config_type: returns the config class; called when the command runs, so it may import lazily.
        file_option: what the option that takes the file is called.

    Raises:
        ConfigError: from the command, when the file or an override is refused.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(
            *args: Any, config_file: str | None, print_config: bool, overrides: tuple[str, ...], **others: Any
        ) -> Any:
            loaded = configs.load(config_type(), config_file, join_overrides(overrides, _option_names()))
            if print_config:
                click.echo(loaded.to_yaml(), nl=False)
                return None
            return function(*args, config=loaded, **others)

        options = [
            click.option(file_option, "config_file", metavar="FILE", type=click.Path(), help="YAML config file."),
            click.option(
                "--print-config",
                is_flag=True,
                help="Print the config with every default filled in, and stop.",
            ),
            click.argument(
                "overrides",
                nargs=-1,
                type=click.UNPROCESSED,
                metavar="[--FIELD.SUBFIELD=VALUE]...",
                cls=_Overrides,
            ),
        ]
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def join_overrides(words: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """Turn the words `--a.b=1 --c 2` into `["--a.b=1", "--c=2"]`.

    Args:
        words: what the command's own options left over.
        options: the command's own options; a word close to one of them is taken for a misspelling.

    Raises:
        ConfigError: a word is not an override, an override has no value, or it is a misspelt option.
    """
    joined: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected argument {word!r}", "a config field is set as --section.field=value")
        name = word.partition("=")[0]
        if "." not in name and (close := difflib.get_close_matches(name, options, n=1, cutoff=0.75)):
            raise ConfigError(f"no such option {name!r}", f"did you mean {close[0]!r}?")
        if "=" in word:
            joined.append(word)
        elif remaining and not remaining[0].startswith("--"):
            joined.append(f"{word}={remaining.pop(0)}")
        else:
            raise ConfigError(f"{word} has no value", f"write {word}=VALUE, for example {word}=true")
    return joined


def _option_names() -> list[str]:
    return [name for parameter in click.get_current_context().command.params for name in parameter.opts]


class _Overrides(click.Argument):
    """Takes every word the command's own options leave over, unknown options included."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let this command's parser pass on options it does not know; `join_overrides` judges them."""
        parser.ignore_unknown_options = True
        super().add_to_parser(parser, ctx)
