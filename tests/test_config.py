"""Configs: what is refused and how it is said, files and overrides, and the round trip through YAML."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from pydantic import Discriminator, Field, Tag, ValidationError, field_validator

from modelyard import config_file
from modelyard.config import Config, load, parse, settings
from modelyard.errors import ConfigError


class AdamW(Config):
    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Sgd(Config):
    kind: Literal["sgd"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0


class Stage(Config):
    name: str
    max_steps: int = Field(default=100, gt=0)


class Batch(Config):
    rows: int = 8
    micro: int = 2


class Fresh(Config):
    layers: int = 2


class Pretrained(Config):
    folder: str


class Job(Config):
    name: str = "job"
    model: Annotated[
        Annotated[Fresh, Tag("fresh")] | Annotated[Pretrained, Tag("pretrained")],
        Discriminator(lambda value: "pretrained" if "folder" in value else "fresh"),
    ] = Fresh()
    optimizer: Annotated[AdamW | Sgd, Field(discriminator="kind")] = AdamW(learning_rate=0.5)
    stages: tuple[Stage, ...] = ()
    options: tuple[Annotated[AdamW | Sgd, Field(discriminator="kind")], ...] = ()
    pools: dict[str, Stage] = {}
    batch: Batch = Batch(rows=64)
    extra: Stage | None = None
    ratio: float | str | None = None
    folder: Path = Path("here")
    compile: bool = False

    @field_validator("name")
    @classmethod
    def _no_spaces(cls, name: str) -> str:
        if " " in name:
            raise ValueError("A name holds no spaces")
        return name


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Job, data)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_a_config_cannot_be_changed_after_it_is_built() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Job().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "field", "suggestion"),
    [
        ({"nmae": "x"}, "nmae", "name"),
        ({"batch": {"rwos": 1}}, "batch.rwos", "rows"),
        ({"extra": {"name": "a", "max_step": 1}}, "extra.max_step", "max_steps"),
        ({"stages": [{"name": "a"}, {"name": "b", "max_step": 1}]}, "stages.1.max_step", "max_steps"),
        ({"pools": {"name": {"name": "a", "max_step": 1}}}, "pools.name.max_step", "max_steps"),
        ({"optimizer": {"kind": "sgd", "momentun": 1}}, "optimizer.momentun", "momentum"),
        ({"optimizer": {"kind": "adamw", "beta": 1}}, "optimizer.beta", "betas"),
        (
            {"options": [{"kind": "sgd"}, {"kind": "sgd", "momentun": 1}]},
            "options.1.momentun",
            "momentum",
        ),
        ({"model": {"layer": 3}}, "model.layer", "layers"),
        ({"model": {"folder": "x", "foldr": "y"}}, "model.foldr", "folder"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_key_of_the_class_that_holds_it(
    data: dict[str, Any], field: str, suggestion: str
) -> None:
    assert f"{field}: unknown key; did you mean {suggestion!r}?" in refusal(data)


def test_a_key_of_another_union_member_is_unknown_in_this_one() -> None:
    assert "optimizer.momentum: unknown key; known: betas, kind, learning_rate" in refusal(
        {"optimizer": {"kind": "adamw", "momentum": 0.9}}
    )


def test_the_named_field_can_be_pasted_as_an_override() -> None:
    assert "--optimizer.learning_rate=VALUE" in refusal({"optimizer": {"kind": "sgd", "learning_rate": "fast"}})
    assert "--ratio=VALUE" in refusal({"ratio": [1]}), "no name of a union's member either"


def test_an_unknown_kind_is_refused_with_the_nearest_kind() -> None:
    assert "optimizer.kind: unknown value 'adam'; did you mean 'adamw'?" in refusal({"optimizer": {"kind": "adam"}})
    assert "options.0.kind: required, but not given; known: adamw, sgd" in refusal({"options": [{"momentum": 1}]})


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"extra": {"name": "a", "max_steps": 0}}, "extra.max_steps: input should be greater than 0 (got 0)"),
        ({"batch": {"rows": "many"}}, "batch.rows: input should be a valid integer, unable to parse"),
        ({"batch": {"rows": 1.5}}, "(got 1.5)"),
        ({"batch": 3}, "batch: input should be a valid dictionary or instance of Batch (got 3)"),
        ({"stages": {"name": "a"}}, "stages: should be a list, for example"),
        ({"extra": {}}, "extra.name: required, but not given"),
        ({"name": 7}, "name: input should be a valid string, in quotes (got 7)"),
        ({"name": "a b"}, "name: a name holds no spaces (got 'a b')"),
        ({"optimizer": {"kind": "adamw", "learning_rate": float("nan")}}, "finite number (got nan)"),
        ({"optimizer": {"kind": "adamw", "betas": [0.9]}}, "optimizer.betas"),
    ],
)
def test_a_refused_value_is_told_by_field_limit_and_value(data: dict[str, Any], line: str) -> None:
    assert line in refusal(data)


def test_every_refused_field_is_told_at_once_and_the_message_ends_in_what_to_do() -> None:
    text = refusal({"nmae": 1, "batch": {"rows": "x"}})
    assert "2 problems" in text
    assert "nmae: unknown key" in text
    assert "batch.rows: input" in text
    assert text.splitlines()[-1].startswith("  -> change ")


def test_a_huge_value_is_shortened_in_the_message() -> None:
    assert len(refusal({"name": list(range(100_000))})) < 400


def test_a_section_given_in_part_keeps_the_rest_of_the_fields_own_default() -> None:
    job = parse(Job, {"batch": {"micro": 4}, "optimizer": {"betas": [0.8, 0.9]}})
    assert job.batch == Batch(rows=64, micro=4)
    assert job.optimizer == AdamW(learning_rate=0.5, betas=(0.8, 0.9))


def test_another_kind_takes_nothing_from_the_default_kind() -> None:
    assert parse(Job, {"optimizer": {"kind": "sgd"}}).optimizer == Sgd()


class Outer(Config):
    job: Job = Job(name="outer", batch=Batch(rows=1))


def test_defaults_reach_through_nested_sections() -> None:
    outer = parse(Outer, {"job": {"batch": {"micro": 9}, "optimizer": {"learning_rate": 2}}})
    assert outer.job == Job(name="outer", batch=Batch(rows=1, micro=9), optimizer=AdamW(learning_rate=2))


# Files


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("3E4", 30000.0),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", 10),
        ("0x10", 16),
        ("1e", "1e"),
        ("no", "no"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-3'", "1e-3"),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_mean_the_same_in_a_file_and_in_an_override(tmp_path: Path, text: str, value: Any) -> None:
    in_file = config_file.read(write(tmp_path, f"a: {text}\n"))
    overridden: dict[str, Any] = {}
    config_file.apply_override(overridden, f"--a={text}")
    assert in_file == overridden == {"a": value}
    assert type(in_file["a"]) is type(overridden["a"]) is type(value)


def test_an_empty_file_is_a_config_of_defaults(tmp_path: Path) -> None:
    assert load(Job, write(tmp_path, "# nothing\n")) == load(Job, None) == Job()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", "the key 'name' is given twice"),
        ("batch:\n  rows: 1\n  micro: 1\n  rows: 2\n", "the key 'rows' is given twice"),
        ("name: [a\n", "is not valid YAML"),
        ("name: a\n\tbatch: 1\n", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("- a\n- b\n", "holds a list"),
        ("just words\n", "holds a str"),
        ("1: 2\n", "keys should be strings"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml") as caught:
        load(Job, write(tmp_path, text))
    assert says in str(caught.value)
    assert caught.value.todo


def test_a_yaml_error_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 3"):
        load(Job, write(tmp_path, "name: a\ncompile: true\nname: b\n"))


def test_a_missing_file_a_folder_and_binary_garbage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "garbage.yaml").write_bytes(bytes(range(128, 256)))
    for name, says in [
        ("absent.yaml", "does not exist"),
        (".", "cannot be read"),
        ("garbage.yaml", "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load(Job, tmp_path / name)


def test_a_merge_key_shares_a_section_without_counting_as_a_double_key(tmp_path: Path) -> None:
    path = write(tmp_path, "batch: &b {rows: 3}\npools:\n  x: {name: a}\n  y: {<<: {name: b, max_steps: 4}, name: c}\n")
    assert load(Job, path).pools["y"] == Stage(name="c", max_steps=4)


# Overrides


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "batch: {rows: 1, micro: 1}\n")
    assert load(Job, path, ["--batch.rows=2", "batch.rows=3"]).batch == Batch(rows=3, micro=1)


def test_overrides_create_sections_even_where_the_file_says_nothing_or_null(tmp_path: Path) -> None:
    path = write(tmp_path, "extra:\n")
    job = load(Job, path, ["--extra.name=a", "--pools.x.name=b"])
    assert job.extra == Stage(name="a")
    assert job.pools == {"x": Stage(name="b")}


def test_an_override_may_replace_a_value_by_a_section_as_a_whole() -> None:
    assert load(Job, None, ["--extra={name: a, max_steps: 1e1}"]).extra == Stage(name="a", max_steps=10)
    assert load(Job, None, ["--stages=[{name: a}]"]).stages == (Stage(name="a"),)


def test_an_override_through_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'batch' holds 3 here, not a section"):
        load(Job, write(tmp_path, "batch: 3\n"), ["--batch.rows=2"])


def test_an_item_of_a_list_is_reached_by_its_number() -> None:
    data = {"steps": [{"kind": "prune"}, {"kind": "quantize"}], "skip": ["a", "b"]}
    for override in ("--steps.1.group_size=32", "--skip.0=c"):
        config_file.apply_override(data, override)
    assert data == {"steps": [{"kind": "prune"}, {"kind": "quantize", "group_size": 32}], "skip": ["c", "b"]}
    for override in ("--steps.2.kind=train", "--steps.first.kind=train", "--skip.-1=c"):
        with pytest.raises(ConfigError, match=r"is no number of the list's 2 items\n  -> count from 0 to 1"):
            config_file.apply_override(data, override)


@pytest.mark.parametrize("override", ["--batch.rows", "--=3", "--batch..rows=1", "--.rows=1", "--batch.=1", "--", ""])
def test_an_incomplete_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="is not complete"):
        load(Job, None, [override])


@pytest.mark.parametrize("override", ["--stages=[", "--extra={name: a", "--name='x", "--extra={name: a, name: b}"])
def test_an_override_with_broken_yaml_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        load(Job, None, [override])


@pytest.mark.parametrize(
    "text", ["a: b", "#1", "*x", "&x", "- a", "!tag", "@x", "%x", "a=b", "s3://b/k", "m:/x@y", "|"]
)
def test_an_unquoted_override_is_one_word_whatever_is_in_it(text: str) -> None:
    assert load(Job, None, [f"--ratio={text}"]).ratio == text


def test_a_refusal_says_where_the_value_came_from(tmp_path: Path) -> None:
    path = write(tmp_path, "{}")
    with pytest.raises(ConfigError, match=r"job\.yaml \+ command line: batch\.rows"):
        load(Job, path, ["--batch.rows=x"])
    with pytest.raises(ConfigError, match=r"^no config file: name: required"):
        load(Stage, None)


# Round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.one_of(TEXT, st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.none())


@settings_of_hypothesis(deadline=None)
@given(st.dictionaries(TEXT, st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=4))
@example({"\x85": "\u2028"})
@example({"1e-3": "a\r\nb", "no": "\ufeff"})
def test_any_plain_data_survives_yaml(data: dict[str, Any]) -> None:
    loaded = config_file.yaml.load(config_file.to_yaml(data), Loader=config_file._Loader)
    assert loaded == data
    assert [type(value) for value in loaded.values()] == [type(value) for value in data.values()]


@pytest.mark.parametrize("word", ["1e-3", "no", "true", "0o7", "1_0", "2024-01-01", "", "~", "<<", "#", "é", "a: b"])
def test_a_printed_config_reads_back_equal(tmp_path: Path, word: str) -> None:
    job = Job(ratio=word, optimizer=Sgd(learning_rate=1e-9), stages=(Stage(name=word),), folder=Path("/x y"))
    assert load(Job, write(tmp_path, job.to_yaml())) == job


def test_defaults_are_printed_in_the_order_of_the_class() -> None:
    assert Batch().to_yaml() == "rows: 8\nmicro: 2\n"


def test_configs_pickle_and_equal_configs_have_equal_digests() -> None:
    job = Job(optimizer=Sgd())
    assert pickle.loads(pickle.dumps(job)) == job
    assert job.digest() == parse(Job, {"optimizer": {"kind": "sgd"}}).digest() != Job().digest()


def test_a_list_is_not_called_too_short_for_an_item_that_was_refused() -> None:
    class Recipe(Config):
        steps: tuple[Stage, ...] = Field(min_length=1)

    with pytest.raises(ConfigError) as refused:
        parse(Recipe, {"steps": [{"name": "one", "max_steps": 0}]})
    assert "steps.0.max_steps" in str(refused.value)
    assert "at least 1 item" not in str(refused.value)
    with pytest.raises(ConfigError, match="at least 1 item"):
        parse(Recipe, {"steps": []})


def test_changes_are_checked_again() -> None:
    assert Batch().with_changes(rows=3) == Batch(rows=3)
    with pytest.raises(ConfigError, match="rows"):
        Batch().with_changes(rows="x")


def test_settings_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MODELYARD_STORE", "MODELYARD_TRACKING_URI"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MODELYARD_HOME", str(tmp_path))
    found = settings()
    assert found.store == str(tmp_path / "store")
    assert found.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert found.cache == tmp_path / "cache"
    monkeypatch.setenv("MODELYARD_STORE", "s3://bucket/x")
    assert settings().store == "s3://bucket/x"
