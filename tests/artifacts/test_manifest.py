from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelyard.artifacts import FileEntry, Manifest, Parent
from modelyard.artifacts.manifest import build_manifest, check_name, code_version
from modelyard.errors import IntegrityError, NotFoundError

ENTRY = FileEntry(sha256="a" * 64, size_bytes=3)


def manifest(**changes: object) -> Manifest:
    fields = {"kind": "model", "name": "tiny", "files": {"w": ENTRY}, "created_at": "2026-01-01T00:00:00+00:00"}
    return Manifest.model_validate({**fields, **changes})


def test_a_manifest_reads_back_equal_with_the_same_digest(tmp_path: Path) -> None:
    parent = Parent(reference="datasets:/d/1", digest="sha256:" + "b" * 64)
    config = {"path": Path("/a"), "nested": {"ü": (1, 2)}, 3: None}
    built = build_manifest("model", "tiny", {"w": ENTRY}, parents=(parent,), metrics={"loss": 0.1 + 0.2}, config=config)
    (tmp_path / "manifest.json").write_bytes(built.to_bytes())
    read = Manifest.read(tmp_path)
    assert read == built
    assert read.digest() == built.digest()
    assert read.config == {"path": "/a", "nested": {"ü": [1, 2]}, "3": None}


def test_the_digest_is_fixed_for_all_time() -> None:
    expected = "sha256:5c14161858dfbdd01908b7c255503a7557caf7b6a8d1e631a889c26060996535"
    assert manifest().digest() == expected


def test_the_digest_covers_everything_but_the_time() -> None:
    changes = [
        {"kind": "dataset"},
        {"name": "other"},
        {"files": {"v": ENTRY}},
        {"files": {"w": FileEntry(sha256="c" * 64, size_bytes=3)}},
        {"parents": [{"reference": "models:/x", "digest": "d"}]},
        {"metrics": {"loss": 1.0}},
        {"config": {"a": 1}},
        {"code": {"git": "1"}},
    ]
    assert len({manifest(**change).digest() for change in changes} | {manifest().digest()}) == len(changes) + 1
    assert manifest(created_at="2027").digest() == manifest().digest()


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../b", "a/..", ".", "./a", "a//b", "a/", "a\\b", "a\0b", "manifest.json"]
)
def test_file_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"name|rename"):
        check_name(name)
    plain = json.loads(manifest().to_bytes())
    plain["files"] = {name: plain["files"]["w"]}
    with pytest.raises(IntegrityError):
        Manifest.from_bytes(json.dumps(plain).encode())


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff", b'{"checksum": 1}', b"[" * 100_000])
def test_what_is_not_a_manifest_is_an_integrity_error(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        Manifest.from_bytes(data)


def test_a_manifest_that_reads_the_same_but_has_other_bytes_is_refused() -> None:
    data = manifest().to_bytes()
    for other in (data.replace(b"\n ", b"\n\t", 1), data + b"\n", data.replace(b'"kind"', b'"k\\u0069nd"')):
        assert json.loads(other) == json.loads(data)
        with pytest.raises(IntegrityError, match="changed after it was written"):
            Manifest.from_bytes(other)


def test_a_missing_manifest_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"manifest\.json"):
        Manifest.read(tmp_path)


def test_the_code_version_survives_the_absence_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(code_version(str(tmp_path))) == {"modelyard", "python"}
