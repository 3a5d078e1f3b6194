"""`modelyard completion SHELL`: print the script that makes a shell complete `modelyard`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

ENV_COMPLETE = "_MODELYARD_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  echo 'eval "$(modelyard completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(modelyard completion zsh)"' >> ~/.zshrc
    fish:  modelyard completion fish > ~/.config/fish/completions/modelyard.fish
    """
    from modelyard.cli.main import modelyard

    script_type = get_completion_class(shell)
    assert script_type is not None, f"click knows no {shell}"
    click.echo(script_type(modelyard, {}, "modelyard", ENV_COMPLETE).source())
