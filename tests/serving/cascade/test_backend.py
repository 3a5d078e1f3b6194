"""The cascade on real models: who answers, what is sent up, and what happens when one of the two is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.serving.cascade.builders import DATASET, DROP, population
from tests.serving.cascade.conftest import Shop

from modelyard.artifacts import Parent
from modelyard.config import parse
from modelyard.errors import ConfigError, InputError, UnavailableError
from modelyard.serving.cascade.backend import CascadeBackend
from modelyard.serving.cascade.calibration import Observations, calibrate
from modelyard.serving.cascade.collect import observe_generations, observe_predictions
from modelyard.serving.cascade.config import CascadeConfig
from modelyard.serving.cascade.counters import CascadeCollector
from modelyard.serving.cascade.pair import answered_at
from modelyard.serving.cascade.records import Calibration, Score
from modelyard.serving.protocol import Generation, Piece, Sampling

TOKENS = 8
TEXT = Score(kind="mean_logprob")
PROMPTS = ["The quick", "Models answer:", "fox jumps over", "stop", "the lazy dog", "naïve café", "brown", "!"]


def asked(prompt: str = "The quick", **changes: Any) -> Generation:
    sampling = Sampling(max_tokens=TOKENS, temperature=0)
    return replace(Generation(request_id="r", sampling=sampling, prompt=prompt), **changes)


def calibration(shop: Shop, small: str, large: str, score: Score, seen: Observations | None = None) -> Calibration:
    rows = population(600, 0) if seen is None else seen
    parents = {"small": shop.parent(small), "large": shop.parent(large), "dataset": DATASET}
    return calibrate(rows, score=score, target=DROP, **parents)


def configured(shop: Shop, *, text: bool = False, score: Score | None = None, **changes: Any) -> CascadeConfig:
    small, large = ("terse", "fluent") if text else ("mlp", "cnn")
    score = score or (TEXT if text else Score(kind="probability"))
    found = changes.pop("calibration", None) or calibration(shop, small, large, score)
    options: dict[str, Any] = {"small_site": "plant-7", **changes}
    return CascadeConfig(name="both", small=small, large=large, calibration=found, **options)


def cascade(shop: Shop, **options: Any) -> CascadeBackend:
    return CascadeBackend(shop.link, [configured(shop, **options)])


def run(shop: Shop, backend: CascadeBackend, work: Callable[[CascadeBackend], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        try:
            return await work(backend)
        finally:
            await backend.close()
            await shop.link.inner.close()

    return asyncio.run(asyncio.wait_for(whole(), 60))


async def pieces_of(backend: Any, model: str, call: Generation) -> list[Piece]:
    return [piece async for piece in backend.generate(model, call)]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# --- classifiers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_on_real_digits_the_promise_holds_on_the_other_half_with_most_calls_at_the_site(shop: Shop, seed: int) -> None:
    async def observe(_: CascadeBackend) -> Observations:
        images, labels = shop.held_out
        return await observe_predictions(shop.link, "mlp", "cnn", list(images), labels.tolist())

    seen = run(shop, cascade(shop), observe)
    parents = {"small": shop.parent("mlp"), "large": shop.parent("cnn"), "dataset": DATASET}
    found = calibrate(seen, score=Score(kind="probability"), target=DROP, seed=seed, **parents)
    assert found.proof.accuracy_small < found.proof.accuracy_large - 0.03
    assert not found.is_refuted
    assert found.proof.figures.accuracy >= found.proof.accuracy_large - 0.05
    assert found.proof.figures.share_up < 0.4
    assert found.proof.figures.bytes_up == pytest.approx(64 * found.proof.figures.share_up)


@pytest.mark.parametrize(("threshold", "who", "site"), [(0.0, "mlp", "plant-7"), (1.0, "cnn", "cloud")])
def test_at_the_ends_one_model_answers_alone(shop: Shop, threshold: float, who: str, site: str) -> None:
    images = list(shop.held_out.pixels[:100])

    async def work(backend: CascadeBackend) -> Any:
        answers = await backend.predict("both", images)
        seen = dict(shop.link.inputs)
        return answers, await shop.link.predict(who, images), seen, backend.counters()["both"]

    answers, alone, seen, counters = run(shop, cascade(shop, threshold=threshold), work)
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in alone]
    assert {answer["site"] for answer in answers} == {site}
    assert answered_at(answers) == site
    assert seen == {who: 100}  # the other one is not even asked
    assert counters.share_up == threshold


def test_only_what_the_small_model_is_unsure_of_goes_up_and_is_counted(shop: Shop) -> None:
    images = list(shop.held_out.pixels[:150])

    async def work(backend: CascadeBackend) -> Any:
        small, large = [await shop.link.predict(name, images) for name in ("mlp", "cnn")]
        return small, large, await backend.predict("both", images), backend

    small, large, answers, backend = run(shop, cascade(shop, threshold=0.9), work)
    up = [n for n, answer in enumerate(answers) if answer["site"] == "cloud"]
    assert 0 < len(up) < 150
    assert [answer["label"] for answer in answers] == [(large if n in up else small)[n]["label"] for n in range(150)]
    assert max(small[n]["probability"] for n in up) <= min(small[n]["probability"] for n in range(150) if n not in up)
    counters = backend.counters()["both"]
    assert (counters.answered, counters.sent_up, counters.unsure) == (150, len(up), 0)
    assert counters.bytes_up == 64 * len(up)
    assert counters.bytes_down > 30 * len(up)
    assert answered_at(answers) == "cloud,plant-7"
    registry = CollectorRegistry()
    registry.register(CascadeCollector(backend.counters))
    assert f'modelyard_cascade_sent_up_total{{model="both"}} {len(up)}.0'.encode() in generate_latest(registry)


def test_a_backend_that_knows_where_it_answered_is_believed(shop: Shop) -> None:
    shop.link.says_site = {"mlp": "north", "cnn": "eu-west"}
    heard: list[str] = []

    async def work(backend: CascadeBackend) -> Any:
        return await backend.predict("both", list(shop.held_out.pixels[:100]), site="north", on_site=heard.append)

    answers = run(shop, cascade(shop, threshold=0.9), work)
    assert {answer["site"] for answer in answers} == {"north", "eu-west"}
    assert heard == ["eu-west,north"]


def test_without_the_cloud_the_sites_answers_stand_and_say_so(shop: Shop) -> None:
    images = list(shop.held_out.pixels[:100])
    shop.link.cut = {"cnn"}

    async def work(backend: CascadeBackend) -> Any:
        first = await backend.predict("both", images)
        shop.link.cut = set()
        paused = await backend.predict("both", images)
        return await shop.link.predict("mlp", images), first, paused, backend.counters()["both"]

    alone, first, paused, counters = run(shop, cascade(shop, threshold=0.95, large_pause_s=60), work)
    assert [answer["label"] for answer in first] == [answer["label"] for answer in alone]
    assert {answer["site"] for answer in first} == {"plant-7"}
    unsure = [answer.get("unsure", False) for answer in first]
    assert 0 < sum(unsure) < 100
    assert answered_at(first) == "plant-7,plant-7;unsure"
    assert paused == first  # the cloud is left alone for `large_pause_s`
    assert (counters.unsure, counters.sent_up) == (2 * sum(unsure), 0)


def test_after_the_pause_the_cloud_is_asked_again(shop: Shop) -> None:
    images = list(shop.held_out.pixels[:50])
    shop.link.cut = {"cnn"}

    async def work(backend: CascadeBackend) -> Any:
        await backend.predict("both", images)
        shop.link.cut = set()
        return await backend.predict("both", images)

    assert answered_at(run(shop, cascade(shop, threshold=1.0, large_pause_s=0), work)) == "cloud"


def test_without_the_small_model_the_cloud_answers(shop: Shop) -> None:
    images = list(shop.held_out.pixels[:20])
    shop.link.cut = {"mlp"}

    async def work(backend: CascadeBackend) -> Any:
        return await backend.predict("both", images), backend.counters()["both"]

    answers, counters = run(shop, cascade(shop, threshold=0.5), work)
    assert answered_at(answers) == "cloud"
    assert (counters.small_failed, counters.sent_up) == (20, 20)


def test_without_either_the_call_fails(shop: Shop) -> None:
    shop.link.cut = {"mlp", "cnn"}
    with pytest.raises(UnavailableError, match="cnn cannot be reached"):
        run(shop, cascade(shop), lambda backend: backend.predict("both", list(shop.held_out.pixels[:2])))


def test_a_bad_input_is_refused_and_not_sent_up(shop: Shop) -> None:
    with pytest.raises(InputError, match="shape"):
        run(shop, cascade(shop), lambda backend: backend.predict("both", [np.zeros((3, 3), np.uint8)]))
    assert "cnn" not in shop.link.inputs


# --- text -------------------------------------------------------------------------------------------------------


def test_a_streamed_text_is_of_one_model_and_begins_with_who(shop: Shop) -> None:
    async def work(backend: CascadeBackend) -> Any:
        alone = {name: text_of(await pieces_of(shop.link, name, asked())) for name in ("terse", "fluent")}
        return alone, await pieces_of(backend, "both", asked())

    for threshold, who, site in ((0.0, "terse", "plant-7"), (1.0, "fluent", "cloud")):
        alone, pieces = run(shop, cascade(shop, text=True, threshold=threshold), work)
        assert alone["terse"] != alone["fluent"]
        assert text_of(pieces) == alone[who]
        assert pieces[0].site == site
        assert all(piece.site is None and not piece.logprobs for piece in pieces[1:])
        assert pieces[-1].usage is not None


def test_real_confidences_decide_which_texts_go_up(shop: Shop) -> None:
    async def work(_: CascadeBackend) -> Any:
        right = {number: number % 2 == 0 for number in range(len(PROMPTS))}
        calls = [asked(prompt) for prompt in PROMPTS]
        seen = await observe_generations(shop.link, "terse", "fluent", TEXT, calls, lambda n, text: right[n])
        middle = float(np.median(seen.confidence))
        mixed = cascade(shop, text=True, threshold=middle)
        first = [(await pieces_of(mixed, "both", call))[0].site for call in calls]
        return seen, middle, first, mixed.counters()["both"]

    seen, middle, sites, counters = run(shop, cascade(shop, text=True), work)
    assert [site == "plant-7" for site in sites] == [value > middle for value in seen.confidence]
    assert 0 < sites.count("cloud") < len(PROMPTS)
    assert counters.bytes_up == sum(seen.bytes_up[seen.confidence <= middle])
    assert counters.bytes_down == sum(seen.bytes_down[seen.confidence <= middle])


def test_deciding_on_the_first_tokens_streams_the_rest_as_it_comes(shop: Shop) -> None:
    score = Score(kind="quantile_logprob", first_tokens=2)

    async def work(backend: CascadeBackend) -> Any:
        stream = backend.generate("both", asked(sampling=Sampling(max_tokens=200, temperature=0)))
        first = await anext(stream)
        done_when_decided = shop.link.closed.copy()
        rest = [piece async for piece in stream]
        return first, rest, done_when_decided

    first, rest, done = run(shop, cascade(shop, text=True, score=score, threshold=1e-9), work)
    assert done == []  # the small model was still at work when its first piece was passed on
    assert (first.site, rest[-1].usage.completion_tokens) == ("plant-7", 200)


def test_sending_up_early_stops_the_small_model(shop: Shop) -> None:
    score = Score(kind="quantile_logprob", first_tokens=2)

    async def work(backend: CascadeBackend) -> Any:
        call = asked(sampling=Sampling(max_tokens=200, temperature=0))
        stream = backend.generate("both", call)
        await anext(stream)
        closed = shop.link.closed.copy()
        await stream.aclose()
        return closed

    assert run(shop, cascade(shop, text=True, score=score, threshold=0.999999), work) == ["terse"]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_without_the_cloud_the_sites_text_stands_whole_and_says_so(shop: Shop, is_streamed: bool) -> None:
    shop.link.breaks_after_pieces = {"fluent": 1}  # accepted, then lost before any text

    async def work(backend: CascadeBackend) -> Any:
        alone = await pieces_of(shop.link, "terse", asked())
        return alone, await pieces_of(backend, "both", asked(is_streamed=is_streamed)), backend.counters()["both"]

    alone, pieces, counters = run(shop, cascade(shop, text=True, threshold=0.999999), work)
    assert text_of(pieces) == text_of(alone)
    assert pieces[0].site == "plant-7;unsure"
    assert (counters.unsure, counters.sent_up, counters.answered) == (1, 0, 1)


def test_a_text_of_the_cloud_that_breaks_off_is_not_finished_by_the_small_model(shop: Shop) -> None:
    shop.link.breaks_after_pieces = {"fluent": 5}

    async def work(backend: CascadeBackend) -> list[Piece]:
        return await pieces_of(backend, "both", asked())

    with pytest.raises(UnavailableError, match="fluent was lost"):
        run(shop, cascade(shop, text=True, threshold=1.0), work)


def test_an_unstreamed_text_of_the_cloud_that_breaks_off_falls_back_whole(shop: Shop) -> None:
    shop.link.breaks_after_pieces = {"fluent": 5}

    async def work(backend: CascadeBackend) -> Any:
        return await pieces_of(shop.link, "terse", asked()), await pieces_of(backend, "both", asked(is_streamed=False))

    alone, pieces = run(shop, cascade(shop, text=True, threshold=0.999999), work)
    assert text_of(pieces) == text_of(alone)


def test_a_small_model_that_breaks_off_is_replaced_by_the_cloud(shop: Shop) -> None:
    shop.link.breaks_after_pieces = {"terse": 2}

    async def work(backend: CascadeBackend) -> Any:
        return await pieces_of(shop.link, "fluent", asked()), await pieces_of(backend, "both", asked())

    alone, pieces = run(shop, cascade(shop, text=True, threshold=1e-9), work)
    assert text_of(pieces) == text_of(alone)
    assert pieces[0].site == "cloud"


def test_a_cloud_that_says_nothing_counts_as_gone(shop: Shop) -> None:
    class Silent:
        def __getattr__(self, name: str) -> Any:
            return getattr(shop.link, name)

        async def generate(self, model: str, call: Generation) -> Any:
            await asyncio.Event().wait()
            yield

    config = configured(shop, text=True, threshold=0.999999, large_timeout_s=0.2)
    backend = CascadeBackend(shop.link, [config], cloud=Silent())
    pieces = run(shop, backend, lambda found: pieces_of(found, "both", asked()))
    assert pieces[0].site == "plant-7;unsure"
    assert pieces[-1].usage is not None


def test_every_choice_must_be_sure(shop: Shop) -> None:
    async def work(_: CascadeBackend) -> Any:
        sampling = Sampling(max_tokens=TOKENS, temperature=1.5, seed=5, top_logprobs=0)
        alone = await pieces_of(shop.link, "terse", asked(sampling=sampling, num_choices=3))
        per_choice = [[p.logprob for each in alone if each.index == n for p in each.logprobs] for n in range(3)]
        sure = sorted(float(np.exp(np.mean(values))) for values in per_choice)
        found = []
        for threshold in (sure[0] * 0.999, sure[0] * 1.001):
            mixed = cascade(shop, text=True, threshold=threshold)
            found.append((await pieces_of(mixed, "both", asked(sampling=sampling, num_choices=3)))[0].site)
        return sure, found

    sure, found = run(shop, cascade(shop, text=True), work)
    assert sure[0] * 1.001 < sure[-1]
    assert found == ["plant-7", "cloud"]


def test_a_caller_who_asks_for_log_probabilities_gets_them(shop: Shop) -> None:
    sampling = Sampling(max_tokens=TOKENS, temperature=0, top_logprobs=1)

    async def work(backend: CascadeBackend) -> list[Piece]:
        return await pieces_of(backend, "both", asked(sampling=sampling))

    pieces = run(shop, cascade(shop, text=True, threshold=0.0), work)
    assert sum(len(piece.logprobs) for piece in pieces) == TOKENS


# --- which models it is for ---------------------------------------------------------------------------------------


def test_a_calibration_of_another_version_is_refused_at_the_start(shop: Shop) -> None:
    found = calibration(shop, "mlp", "cnn", Score(kind="probability"))
    other = found.with_changes(small=Parent(reference="models:/mlp/9", digest="sha256:" + "d" * 64).model_dump())
    with pytest.raises(ConfigError, match="made with the small model models:/mlp/9"):
        run(shop, cascade(shop, calibration=other), lambda backend: backend.start())


def test_until_it_is_calibrated_again_another_version_is_not_trusted(shop: Shop) -> None:
    found = calibration(shop, "mlp", "cnn", Score(kind="probability"))
    other = found.with_changes(large=Parent(reference="models:/cnn/9", digest="sha256:" + "d" * 64).model_dump())
    backend = cascade(shop, calibration=other, threshold=0.0)
    assert answered_at(run(shop, backend, lambda b: b.predict("both", list(shop.held_out.pixels[:9])))) == "cloud"
    assert shop.link.inputs == {"cnn": 9}


def test_a_right_calibration_starts_and_is_listed_beside_the_models(shop: Shop) -> None:
    async def work(backend: CascadeBackend) -> Any:
        await backend.start()
        return {model.name: model for model in await backend.models()}

    listed = run(shop, cascade(shop, text=True), work)
    assert set(listed) == {"both", "mlp", "cnn", "terse", "fluent"}
    assert listed["both"].reference == f"{listed['terse'].reference} > {listed['fluent'].reference}"
    assert (listed["both"].task, listed["both"].engine) == ("causal_lm", "cascade")
    assert "embeddings" not in listed["both"].features


def test_other_models_pass_through(shop: Shop) -> None:
    async def work(backend: CascadeBackend) -> Any:
        alone = await pieces_of(shop.link, "fluent", asked())
        vectors, _ = await backend.embed("fluent", ["fox"])
        return alone, await pieces_of(backend, "fluent", asked()), vectors

    alone, passed, vectors = run(shop, cascade(shop), work)
    assert passed == alone
    assert len(vectors) == 1


def test_what_a_cascade_cannot_do_is_refused(shop: Shop) -> None:
    async def work(backend: CascadeBackend) -> None:
        with pytest.raises(InputError, match="do not compare"):
            await backend.embed("both", ["fox"])
        with pytest.raises(InputError, match="gives no text"):
            await pieces_of(backend, "both", asked())

    run(shop, cascade(shop), work)
    with pytest.raises(InputError, match="gives no predictions"):
        run(shop, cascade(shop, text=True), lambda backend: backend.predict("both", [np.zeros((8, 8), np.uint8)]))


def test_a_config_reads_its_calibration_from_a_file_and_carries_it(shop: Shop, tmp_path: Path) -> None:
    made = calibration(shop, "mlp", "cnn", Score(kind="probability"))
    made.write(tmp_path / "cascade.json")
    plain = {"name": "digits", "small": "mlp", "large": "cnn", "calibration": str(tmp_path / "cascade.json")}
    config = parse(CascadeConfig, plain)
    assert config.calibration == made
    assert parse(CascadeConfig, config.model_dump(mode="json")) == config  # as it travels to a gateway's replicas
    with pytest.raises(ConfigError, match="no calibration"):
        parse(CascadeConfig, {**plain, "calibration": str(tmp_path / "none.json")})
    with pytest.raises(ConfigError, match="three names"):
        parse(CascadeConfig, {**plain, "name": "mlp"})
    with pytest.raises(ConfigError, match="two are named 'digits'"):
        CascadeBackend(shop.link, [config, config])
