"""`modelyard serve cascade`: registered models and held-out rows in, a calibration out."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.serving.cascade import digits
from tests.serving.cascade.conftest import Shop
from tests.serving.models import TEXT

from modelyard.artifacts import Parent, Registry, VersionInfo
from modelyard.cli.cascade import cascade
from modelyard.data.shards import ShardWriter
from modelyard.errors import ConfigError, DataError
from modelyard.serving.cascade.records import Calibration
from modelyard.serving.protocol import Generation, Sampling


def run(*args: str) -> Result:
    return CliRunner().invoke(cascade, args)


def ok(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def dataset(
    folder: Path, rows: digits.Digits, classes: tuple[str, ...] = tuple("0123456789"), split: str = "validation"
) -> VersionInfo:
    info = digits.info().with_changes(classes=classes, splits={split: len(rows.labels)})
    folder.mkdir()
    writer = ShardWriter(folder, split, info.columns, rows_per_shard=1_000)
    writer.write({"pixels": rows.pixels[:, None], "label": rows.labels})
    writer.close()
    (folder / "dataset.json").write_text(json.dumps(info.model_dump(mode="json")))
    registry = Registry.from_settings()
    return registry.register(registry.store.put(folder, kind="dataset", name=folder.name))


def test_images_are_calibrated_on_a_split_and_shown(shop: Shop, tmp_path: Path) -> None:
    rows = digits.Digits(shop.held_out.pixels[:400], shop.held_out.labels[:400])
    data = dataset(tmp_path / "held-out", rows)
    out, png = tmp_path / "cascade.json", tmp_path / "curve.png"
    models = [shop.versions[name].reference for name in ("mlp", "cnn")]
    told = ok("calibrate", *models, "--dataset", data.reference, "--max-accuracy-drop", "0.05", "--out", str(out))
    found = Calibration.read(out)
    assert (found.small, found.large) == (shop.parent("mlp"), shop.parent("cnn"))
    assert (found.dataset.digest, found.split, found.rows, found.proof.rows) == (data.digest, "validation", 200, 200)
    assert 0 < found.proof.figures.share_up < 0.6
    assert f"{found.threshold:.4f} (probability)" in told
    assert "accuracy drop at most 5.00%" in told
    assert "accuracy drop at most 5.00%" in ok("show", str(out), "--png", str(png))
    assert png.read_bytes().startswith(b"\x89PNG")


def test_texts_are_calibrated_on_examples(shop: Shop, tmp_path: Path) -> None:
    prompts = [TEXT[n : n + 12] for n in range(0, 1_200, 10)]
    file = tmp_path / "examples.jsonl"

    async def answered(prompt: str) -> str:
        call = Generation(request_id="r", sampling=Sampling(max_tokens=4, temperature=0), prompt=prompt)
        return "".join([piece.text async for piece in shop.link.generate("fluent", call)])

    async def write() -> None:
        lines = [json.dumps({"prompt": prompt, "answer": await answered(prompt) or "?"}) for prompt in prompts]
        file.write_text("\n".join(lines))
        await shop.link.inner.close()

    asyncio.run(write())
    out = tmp_path / "cascade.json"
    models = [shop.versions[name].reference for name in ("terse", "fluent")]
    bound = ["--max-share-up", "0.3", "--max-tokens", "4", "--judge", "exact", "--engine", "transformers"]
    told = ok("calibrate", *models, "--examples", str(file), *bound, "--score", "quantile_logprob", "--out", str(out))
    found = Calibration.read(out)
    assert (found.score.kind, found.small_engine) == ("quantile_logprob", "transformers")
    assert found.proof.accuracy_large > 0.9 > found.proof.accuracy_small
    assert 0.05 < found.proof.figures.share_up < 0.45
    assert found.proof.figures.accuracy > found.proof.accuracy_small
    assert "share sent up at most 30.00%" in told


def test_rows_that_cannot_be_used_are_refused(shop: Shop, tmp_path: Path) -> None:
    rows = digits.Digits(shop.held_out.pixels[:60], shop.held_out.labels[:60])
    few = dataset(tmp_path / "few", rows).reference
    other = dataset(tmp_path / "letters", rows, tuple("abcdefghij")).reference
    models = [shop.versions[name].reference for name in ("mlp", "cnn")]
    texts = [shop.versions[name].reference for name in ("terse", "fluent")]
    drop = ["--max-accuracy-drop", "0.05"]
    for args, error, says in (
        ([*models, *drop, "--dataset", few], DataError, "30 rows cannot show"),
        ([*models, *drop, "--dataset", few, "--split", "test"], DataError, "no split 'test'"),
        ([*models, *drop, "--dataset", other], DataError, "classes are other ones"),
        ([*texts, *drop, "--dataset", few], ConfigError, "is for causal_lm"),
        ([*models, *drop], ConfigError, "--dataset or --examples"),
        ([*models, "--dataset", few], ConfigError, "max_accuracy_drop or max_share_up"),
    ):
        result = run("calibrate", *args)
        assert isinstance(result.exception, error), (args, result.output, result.exception)
        assert says in str(result.exception)


@pytest.mark.parametrize("line", ["{", '{"prompt": "x"}', '{"prompt": "x", "answer": " "}', '{"answer": "x"}'])
def test_a_line_that_is_no_example_is_named(shop: Shop, tmp_path: Path, line: str) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' + line)
    models = [shop.versions[name].reference for name in ("terse", "fluent")]
    result = run("calibrate", *models, "--examples", str(file), "--max-share-up", "0.3")
    assert isinstance(result.exception, DataError)
    assert "line 2" in str(result.exception)


def test_the_split_that_a_model_was_trained_on_is_refused(shop: Shop, tmp_path: Path) -> None:
    data = dataset(tmp_path / "seen", digits.Digits(*(part[:400] for part in shop.held_out)), split="train")
    registry = Registry.from_settings()
    _, folder = registry.open(shop.versions["mlp"].reference, "model")
    shutil.copytree(folder, tmp_path / "again", ignore=shutil.ignore_patterns("manifest.json"))
    parent = Parent(reference=data.reference, digest=data.digest)
    put = registry.store.put(tmp_path / "again", kind="model", name="of-seen", parents=(parent,))
    models = [registry.register(put).reference, shop.versions["cnn"].reference]
    result = run("calibrate", *models, "--dataset", data.reference, "--split", "train", "--max-share-up", "0.3")
    assert isinstance(result.exception, DataError)
    assert "was trained on the split 'train'" in str(result.exception)
