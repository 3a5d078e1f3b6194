from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from modelyard.artifacts import Parent, Registry, VersionInfo
from modelyard.cli.models import complete_reference, models
from modelyard.errors import IntegrityError, NotFoundError


@pytest.fixture(autouse=True)
def registry(fresh_database: bytes, tmp_path: Path) -> Registry:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mlflow.db").write_bytes(fresh_database)
    return Registry.from_settings()


@pytest.fixture
def family(registry: Registry, tmp_path: Path) -> list[VersionInfo]:
    """A dataset, a model trained on it, and a model made smaller from that one."""
    made: list[VersionInfo] = []
    for kind, name in (("dataset", "docs"), ("model", "tiny"), ("model", "tiny-int8")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a[bold]file.json").write_text(json.dumps(name))
        parents = tuple(Parent(reference=info.reference, digest=info.digest) for info in made[-1:])
        config = {"training": {"max_steps": 7}}
        manifest = registry.store.put(
            folder,
            kind=kind,
            name=name,
            parents=parents,
            metrics={"loss": 1.25},
            config=config,  # type: ignore[arg-type]
        )
        made.append(registry.register(manifest))
    return made


def run(*args: str) -> Result:
    return CliRunner().invoke(models, args)


def ok(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_list_shows_models_and_on_request_datasets(family: list[VersionInfo], registry: Registry) -> None:
    registry.promote("models:/tiny/1", "production")
    text = ok("list")
    assert "models:/tiny/1" in text
    assert "production" in text
    assert "loss 1.25" in text
    assert "datasets:/docs/1" not in text
    assert "datasets:/docs/1" in ok("list", "--kind", "dataset")
    assert len(ok("list", "--kind", "all").splitlines()) == 4
    assert {item["reference"] for item in json.loads(ok("list", "--json"))} == {"models:/tiny/1", "models:/tiny-int8/1"}


def test_list_leaves_the_figures_of_compression_to_show(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_bytes(bytes(90_112))
    metrics = {"loss": 1.25, "compression/size_ratio": 3.5}
    registry.register(registry.store.put(tmp_path / "m", kind="model", name="small", metrics=metrics))
    assert "loss 1.25" in ok("list")
    assert "compression/" not in ok("list")
    assert "compression/size_ratio 3.5" in ok("show", "small")
    assert "1 file, 88 KiB" in ok("show", "small")


def test_an_empty_registry_is_said_and_is_an_empty_json_list() -> None:
    assert "no model is registered" in ok("list")
    assert json.loads(ok("list", "--json")) == []


def test_show_prints_the_whole_family_tree(family: list[VersionInfo]) -> None:
    text = ok("show", "tiny-int8/1")
    tree = text[text.index("made from") :]
    assert [tree.index(info.reference) for info in reversed(family)] == sorted(tree.index(i.reference) for i in family)
    for claim in (family[2].digest, "loss 1.25", "a[bold]file.json", "max_steps: 7", "modelyard 0", "python 3."):
        assert claim in text
    shown = json.loads(ok("show", "--json", "models:/tiny-int8"))
    assert shown["parents"][0]["parents"][0]["reference"] == "datasets:/docs/1"
    assert shown["manifest"]["config"] == {"training": {"max_steps": 7}}


def test_plain_output_is_not_cut_at_any_width(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    name, file = "n" * 100, "f" * 200
    (tmp_path / "m" / file).write_text("x")
    registry.register(registry.store.put(tmp_path / "m", kind="model", name=name))
    assert f"models:/{name}/1" in ok("list")
    assert file in ok("show", name)


def test_show_says_when_a_parent_is_not_registered_or_gone(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.json").write_text("{}")
    lost = Parent(reference="datasets:/lost@best", digest="sha256:" + "0" * 64)
    registry.register(registry.store.put(tmp_path / "m", kind="model", name="tiny", parents=(lost,)))
    text = ok("show", "tiny")
    assert "datasets:/lost@best" in text
    assert "not registered" in text
    assert "there is no dataset" in text


def test_promote_moves_the_alias(family: list[VersionInfo], registry: Registry) -> None:
    assert "models:/tiny@production is now models:/tiny/1" in ok("promote", "tiny/1", "production")
    assert registry.resolve("models:/tiny@production").version == 1


def test_verify_counts_what_it_read_and_names_a_damaged_file(family: list[VersionInfo], registry: Registry) -> None:
    text = ok("verify", "tiny/1")
    assert "1 file, 6 bytes" in text
    _, folder = registry.open("models:/tiny/1")
    (folder / "a[bold]file.json").write_bytes(b'"tinX"')
    result = run("verify", "tiny/1")
    assert result.exit_code == 1
    assert isinstance(result.exception, IntegrityError)
    assert "'a[bold]file.json'" in str(result.exception)


def test_download_writes_the_files_of_a_version_into_a_new_folder(family: list[VersionInfo], tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    assert "a[bold]file.json" in ok("download", "tiny/1", str(target))
    assert (target / "a[bold]file.json").read_text() == '"tiny"'
    assert "is there already" in str(run("download", "tiny/1", str(target)).exception)


def test_a_wrong_reference_is_refused_with_a_hint(family: list[VersionInfo]) -> None:
    result = run("show", "tinny/1")
    assert isinstance(result.exception, NotFoundError)
    assert "did you mean 'tiny'?" in str(result.exception)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", ["datasets:/docs/1", "models:/tiny-int8/1", "models:/tiny/1", "models:/tiny@production"]),
        ("models:/tiny@", ["models:/tiny@production"]),
        ("tiny", ["tiny-int8/1", "tiny/1", "tiny@production"]),
        ("data", ["datasets:/docs/1"]),
        ("zzz", []),
    ],
)
def test_references_complete_from_the_registry(
    family: list[VersionInfo], registry: Registry, typed: str, expected: list[str]
) -> None:
    registry.promote("models:/tiny/1", "production")
    items = complete_reference(None, None, typed)  # type: ignore[arg-type]
    assert [item.value for item in items] == expected


def test_completion_is_silent_when_the_registry_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_TRACKING_URI", "http://127.0.0.1:1")
    assert complete_reference(None, None, "") == []  # type: ignore[arg-type]
