"""The `modelyard` command: exit codes, lazy loading, suggestions, shell completion, shared config options."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from modelyard.cli import main
from modelyard.cli.options import config_options, join_overrides
from modelyard.config import Config
from modelyard.errors import CapacityError, ConfigError, IntegrityError, ModelyardError, StorageError

MODELYARD = str(Path(sys.executable).with_name("modelyard"))


class Part(Config):
    steps: int = 1
    offset: float = 0.0


class Whole(Config):
    name: str = "x"
    part: Part = Part()


def exit_code(command: click.Command, *args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main.run(command, args, "prog")
    code = caught.value.code
    assert isinstance(code, int)
    return code


def raising(error: BaseException) -> click.Command:
    def fail() -> None:
        raise error

    return click.Command("fail", callback=fail)


def showing() -> click.Command:
    """A command with a positional argument, a flag of its own and a config; it prints what it was given."""

    @click.command()
    @click.argument("reference")
    @click.option("--verbose", is_flag=True)
    @config_options(lambda: Whole)
    def show(reference: str, verbose: bool, config: Whole) -> None:
        """Show."""
        click.echo(f"{reference} {verbose} {config!r}")

    return show


# Errors and exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bad", "mend it"), 2),
        (CapacityError("bad", "mend it"), 2),
        (StorageError("bad", "mend it"), 1),
        (IntegrityError("bad", "mend it"), 1),
        (ModelyardError("bad", "mend it"), 1),
    ],
)
def test_an_error_becomes_one_message_and_an_exit_code(
    error: ModelyardError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(raising(error)) == code
    out, err = capsys.readouterr()
    assert (out, click.unstyle(err)) == ("", "error: bad\n  -> mend it\n")


def test_debugging_shows_the_traceback_and_keeps_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODELYARD_DEBUG", "1")
    assert exit_code(raising(ConfigError("bad"))) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_error_that_ray_wrapped_is_shown_as_it_was_raised(capsys: pytest.CaptureFixture[str]) -> None:
    class WrappedError(StorageError):
        cause = StorageError("the disk is full", "free some")

        def __str__(self) -> str:
            return "a remote traceback of thirty lines"

    assert exit_code(raising(WrappedError("x"))) == 1
    assert click.unstyle(capsys.readouterr().err) == "error: the disk is full\n  -> free some\n"


@pytest.mark.ray
def test_an_error_raised_in_a_ray_task_is_shown_as_it_was_raised(
    ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    @ray.remote
    def fill() -> None:
        raise StorageError("the disk is full", "free some")

    assert exit_code(click.Command("c", callback=lambda: ray.get(fill.remote(), timeout=60))) == 1
    assert click.unstyle(capsys.readouterr().err) == "error: the disk is full\n  -> free some\n"


def test_an_interrupted_command_exits_with_130() -> None:
    assert exit_code(raising(KeyboardInterrupt())) == 130


def test_ctrl_c_ends_a_real_process_with_130_and_no_traceback(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import time, click\nfrom modelyard.cli.main import run\n"
        "run(click.Command('job', callback=lambda: (print('up', flush=True), time.sleep(60))))\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err.strip()) == (130, "interrupted")


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        main.run(raising(ZeroDivisionError()), [])


def test_a_command_ends_with_zero_or_with_the_code_it_chose() -> None:
    assert exit_code(click.Command("c", callback=lambda: None)) == 0
    assert exit_code(click.Command("c", callback=lambda: True)) == 0
    assert exit_code(click.Command("c", callback=lambda: click.get_current_context().exit(3))) == 3


# The table of commands


def test_help_comes_fast_and_imports_nothing_heavy() -> None:
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        answer = subprocess.run([MODELYARD, "--help"], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
    assert all(name in answer.stdout for name in main.COMMANDS)
    assert best < 0.5, f"modelyard --help took {best:.2f} s"


@pytest.mark.parametrize(("word", "says"), [("modles", "did you mean 'models'?"), ("zzz", "known: backup, ")])
def test_a_misspelt_command_is_refused_with_a_suggestion(word: str, says: str, capsys: Any) -> None:
    assert exit_code(main.modelyard, word) == 2
    assert says in capsys.readouterr().err


def skip_when_not_written(entry: main.Entry) -> None:
    """Skip only while a file of this command is not there; one that does not import is a failure."""
    for target in (entry.target, *entry.added.values()):
        if importlib.util.find_spec(target.partition(":")[0]) is None:
            pytest.skip(f"{target} is not written yet")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_command_of_the_table_exists_and_has_the_help_line_of_the_table(name: str) -> None:
    entry = main.COMMANDS[name]
    skip_when_not_written(entry)
    command = main.modelyard.get_command(click.Context(main.modelyard), name)
    assert command is not None
    assert command.help
    if isinstance(command, click.Group):
        assert set(entry.added) <= set(command.commands)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_help_of_a_command_needs_neither_ray_nor_torch(name: str) -> None:
    skip_when_not_written(main.COMMANDS[name])
    code = (
        f"import sys; from click.testing import CliRunner; from modelyard.cli.main import modelyard;"
        f"answer = CliRunner().invoke(modelyard, [{name!r}, '--help']);"
        f"assert answer.exit_code == 0, answer.output;"
        f"print([m for m in ('ray', 'torch', 'mlflow', 'transformers') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (answer.stdout, answer.stderr) == ("[]\n", "")


def test_a_group_gains_the_commands_that_other_modules_add(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "added_fruit.py").write_text(
        "import click\nfruit = click.Group('fruit')\npear = click.Command('pear', callback=lambda: print('pear!'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    entry = main.Entry("added_fruit:fruit", "Fruit.", {"pear": "added_fruit:pear"})
    group = main.LazyGroup("top", entries={"fruit": entry})
    assert CliRunner().invoke(group, ["fruit", "pear"]).output == "pear!\n"


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(main.modelyard, ["--version"]).output.startswith("modelyard, version ")


# Completion


def complete(*words: str) -> list[str]:
    """What bash would be offered after these words, from the installed command."""
    environment = {
        **os.environ,
        "_MODELYARD_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["modelyard", *words]),
        "COMP_CWORD": str(len(words)),
    }
    answer = subprocess.run([MODELYARD], env=environment, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in answer.stdout.splitlines()]


def test_completion_offers_commands_options_and_shells() -> None:
    assert complete("") == sorted(main.COMMANDS)
    assert complete("doc") == ["doctor"]
    assert complete("--v") == ["--version"]
    assert complete("doctor", "--j") == ["--json"]
    assert complete("completion", "") == ["bash", "zsh", "fish"]


def test_the_bash_script_completes_in_a_real_bash() -> None:
    code = (
        'eval "$(modelyard completion bash)"; COMP_WORDS=(modelyard doc); COMP_CWORD=1;'
        ' _modelyard_completion modelyard; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{Path(MODELYARD).parent}:{os.environ['PATH']}"}
    answer = subprocess.run(["bash", "--norc", "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "doctor\n"


@pytest.mark.parametrize(("shell", "holds"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete ")])
def test_every_shell_has_its_script(shell: str, holds: str) -> None:
    assert holds in CliRunner().invoke(main.modelyard, ["completion", shell]).output


# Config options


@pytest.mark.parametrize(
    ("args", "steps"),
    [
        (["--part.steps=3"], 3),
        (["--part.steps", "3"], 3),
        (["--part.steps=3", "--verbose", "--part.steps", "4"], 4),
        (["--part.steps=1e2"], 100),
        (["--part={steps: 5}"], 5),
        (["--part", "{steps: 6}"], 6),
    ],
)
def test_overrides_reach_the_config(args: list[str], steps: int) -> None:
    answer = CliRunner().invoke(showing(), ["ref", *args], catch_exceptions=False)
    assert answer.output == f"ref {'--verbose' in args} {Whole(part=Part(steps=steps))!r}\n"


def test_a_negative_number_is_a_value_and_not_an_option() -> None:
    assert join_overrides(["--part.offset", "-1e-3", "--name=a=b"]) == ["--part.offset=-1e-3", "--name=a=b"]


def test_the_file_comes_first_and_overrides_after(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: file\npart: {steps: 7}\n")
    answer = CliRunner().invoke(showing(), ["ref", "--name=flag", "--config", str(path)], catch_exceptions=False)
    assert "name='flag', part=Part(steps=7" in answer.output


def test_print_config_prints_what_would_be_used_and_does_nothing_else(tmp_path: Path) -> None:
    answer = CliRunner().invoke(showing(), ["ref", "--print-config", "--part.steps=3"], catch_exceptions=False)
    assert answer.output == "name: x\npart:\n  steps: 3\n  offset: 0.0\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--confg", "x.yaml"], "no such option '--confg'\n  -> did you mean '--config'?"),
        (["--verbos"], "no such option '--verbos'\n  -> did you mean '--verbose'?"),
        (["stray"], "unexpected argument 'stray'"),
        (["--part.steps"], "--part.steps has no value"),
        (["--part.steps", "--name=x"], "--part.steps has no value"),
        (["--part.stesp=1"], "part.stesp: unknown key; did you mean 'steps'?"),
        (["-q"], "unexpected argument '-q'"),
        (["--config", "absent.yaml"], "'absent.yaml' does not exist"),
    ],
)
def test_a_word_that_is_no_override_is_refused(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(showing(), "ref", *args) == 2
    assert says in click.unstyle(capsys.readouterr().err)


def test_a_field_whose_name_is_like_an_option_is_still_a_field() -> None:
    assert join_overrides(["--config.x=1"], ["--config"]) == ["--config.x=1"]
