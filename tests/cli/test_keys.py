from __future__ import annotations

import json
import time

import pytest
from click.testing import CliRunner, Result

from modelyard.cli.keys import keys
from modelyard.errors import ConfigError, NotFoundError
from modelyard.security import KeyStore, TokenQuota
from modelyard.security.keys import key_id


def run(*args: str) -> Result:
    return CliRunner().invoke(keys, args)


def ok(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def made(*args: str) -> str:
    return ok("create", *args).strip()


def test_a_key_is_printed_once_and_alone() -> None:
    key = made("--tenant", "vision")
    record = KeyStore().find(key_id(key) or "")
    assert record is not None
    assert record.opens_for(key)
    shown = ok("list") + ok("list", "--json")
    assert record.id in shown
    assert key.rpartition("-")[2] not in shown


def test_every_bound_of_a_key_is_kept_and_listed() -> None:
    bounds = ["--models", "tiny-*", "--models", "digits", "--rpm", "60", "--tpm", "20000", "--expires", "30d"]
    made("--tenant", "vision", "--name", "line-4", *bounds, "--site", "plant", "--work", "predict")
    row = json.loads(ok("list", "--json"))[0]
    assert row.pop("expires_s") == pytest.approx(time.time() + 30 * 86_400, abs=60)
    assert row.pop("created_s") == pytest.approx(time.time(), abs=60)
    assert len(row.pop("id")) == 12
    assert row == {
        "state": "active",
        "tenant": "vision",
        "name": "line-4",
        "models": ["tiny-*", "digits"],
        "work": ["predict"],
        "rpm": 60,
        "tpm": 20_000,
        "site": "plant",
    }
    for word in ("line-4", "tiny-* digits", "predict", "60", "20000", "plant"):
        assert word in ok("list")


def test_keys_are_listed_by_tenant() -> None:
    made("--tenant", "a")
    made("--tenant", "b")
    assert [row["tenant"] for row in json.loads(ok("list", "--tenant", "b", "--json"))] == ["b"]
    assert "there are no keys" in ok("list", "--tenant", "c")


def test_a_revoked_key_stays_in_the_list_as_revoked() -> None:
    identity = key_id(made("--tenant", "a")) or ""
    assert "is revoked" in ok("revoke", identity)
    assert json.loads(ok("list", "--json"))[0]["state"] == "revoked"
    unknown = run("revoke", "0123456789ab")
    assert isinstance(unknown.exception, NotFoundError)


@pytest.mark.parametrize("span", ["30", "0d", "-1d", "1y", "d", "9999999d"])
def test_a_lifetime_that_is_none_is_refused(span: str) -> None:
    result = run("create", "--tenant", "a", "--expires", span)
    assert result.exit_code == 2
    assert "time span" in result.output


@pytest.mark.parametrize("args", [["--tenant", "a b"], ["--tenant", "a", "--models", ""], ["--tenant", "a" * 129]])
def test_names_that_cannot_be_used_are_refused(args: list[str]) -> None:
    assert isinstance(run("create", *args).exception, ConfigError)


def test_a_tenants_quota_is_set_and_taken_away() -> None:
    assert "1,000 tokens a day, no bound a month" in ok("quota", "vision", "--tokens-per-day", "1000")
    assert KeyStore().quota("vision") == TokenQuota(1_000, None)
    ok("quota", "vision")
    assert KeyStore().quota("vision") == TokenQuota()
