"""The exception tree: it survives pickling, prints problem and remedy, and is drawn as it is."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from modelyard import errors
from modelyard.errors import InputError, MissingExtraError, ModelyardError, OverloadedError, WaitTimeoutError, nearest

TREE = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, ModelyardError) and member.__module__ == errors.__name__
]
SPECIAL = {
    MissingExtraError: MissingExtraError("peft", "lora"),
    OverloadedError: OverloadedError("64 calls wait already", 2.5),
    WaitTimeoutError: WaitTimeoutError("room for 2 workers", 1.5, "workers.start_timeout_s"),
}


def sample(error_type: type[ModelyardError]) -> ModelyardError:
    return SPECIAL.get(error_type) or error_type("the corpus is empty", "check data.path")


@pytest.mark.parametrize("error_type", TREE)
def test_an_error_survives_pickle_and_copy_with_everything_it_says(error_type: type[ModelyardError]) -> None:
    error = sample(error_type)
    error.add_note("rank 3")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is error_type
        assert str(twin) == str(error)
        assert (twin.problem, twin.todo) == (error.problem, error.todo)
        assert (vars(twin), twin.args) == (vars(error), error.args)


@pytest.mark.parametrize("error_type", TREE)
def test_an_error_says_the_problem_and_then_what_to_do(error_type: type[ModelyardError]) -> None:
    error = sample(error_type)
    assert str(error) == f"{error.problem}\n  -> {error.todo}"


def test_an_error_without_a_remedy_prints_the_problem_alone() -> None:
    assert str(ModelyardError("broken")) == "broken"


def test_the_drawing_at_the_top_of_the_module_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    stack: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        name = next((word for word in line.split() if word.endswith("Error")), None)
        if name and ("──" in line or line.strip() == "ModelyardError"):
            depth = (line.index(name) - 4) // 4
            del stack[depth:]
            drawn[name] = stack[-1] if stack else "Exception"
            stack.append(name)
    assert drawn == {error_type.__name__: error_type.__base__.__name__ for error_type in TREE if error_type.__base__}


def test_a_missing_extra_gives_the_install_line() -> None:
    error = MissingExtraError("peft", "lora")
    assert isinstance(error, InputError)
    assert "pip install 'modelyard[lora]'" in str(error)


def test_a_timeout_names_the_time_and_the_setting_that_lengthens_it() -> None:
    text = str(SPECIAL[WaitTimeoutError])
    assert "waited 1.5 s for room for 2 workers" in text
    assert "raise workers.start_timeout_s" in text


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("max_step", ["max_steps", "min_steps"], "did you mean 'max_steps'?"),
        ("zzz", ["b", "a"], "known: a, b"),
        ("zzz", [], "there are none"),
    ],
)
def test_nearest_suggests_one_name_or_lists_all(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint
