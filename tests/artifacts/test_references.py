from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.artifacts import Reference, parse
from modelyard.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models:/tiny-gpt@production", Reference("model", "tiny-gpt", alias="production")),
        ("models:/tiny-gpt/3", Reference("model", "tiny-gpt", version=3)),
        ("models:/tiny-gpt", Reference("model", "tiny-gpt")),
        ("datasets:/py.docs_2/10", Reference("dataset", "py.docs_2", version=10)),
    ],
)
def test_every_form_is_read_and_written_back(text: str, expected: Reference) -> None:
    assert parse(text) == expected
    assert str(expected) == text


def test_the_scheme_may_be_left_out_where_the_kind_is_known() -> None:
    assert parse("tiny/3", "model") == Reference("model", "tiny", version=3)
    assert parse("docs@best", "dataset") == Reference("dataset", "docs", alias="best")


@pytest.mark.parametrize(
    "text",
    [
        *("", "tiny", "models:/", "models://tiny/3", "models:/a/b", "models:/a/0", "models:/a/03", "models:/a/-1"),
        *("models:/a/latest", "models:/a@latest", "models:/a@v3", "models:/a@x y", "models:/a@", "models:/a/3@x"),
        *("models:/../a", "models:/a\n", " models:/a", "s3:/a", "models:/a/\u0663", "models:/a~b"),
        "models:/" + "a" * 129,
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_a_scheme_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="names a dataset, but a model is needed"):
        parse("datasets:/docs/1", "model")


@given(st.text(max_size=40))
def test_no_text_makes_parse_fail_in_another_way(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert str(parse(text)) == text
