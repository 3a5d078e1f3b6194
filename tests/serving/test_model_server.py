"""The model server on real small models: text in, text out, by the rules of the `Backend` protocol."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.serving.models import CONTEXT, classifier, greedy, log_probabilities, register, tiny_llama

from modelyard.artifacts import Registry
from modelyard.errors import (
    CapacityError,
    ConfigError,
    InputError,
    IntegrityError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from modelyard.observability.mlflow_client import connect
from modelyard.serving.engines.choice import Machine
from modelyard.serving.model_server import ModelServer
from modelyard.serving.protocol import Generation, Piece, Sampling
from modelyard.serving.residents import Residents
from modelyard.serving.server_config import ModelConfig, ServerConfig
from modelyard.tasks import load_model
from modelyard.tasks.generation import load_tokenizer

BARE = Machine(frozenset())
TOKENS = 20
CHAT = [{"role": "user", "content": "The quick fox 東京"}]


class Shop:
    """Model folders, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.set_num_threads(1)
        for number in range(3):
            tiny_llama(folder / f"tiny{number}", seed=number)
        tiny_llama(folder / "plain", seed=3, chat=False)
        classifier(folder / "digits")
        connect(f"sqlite:///{folder / 'fresh.db'}")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(autouse=True)
def registry(shop: Shop, tmp_path: Path) -> Registry:
    """A fresh registry for every test, with no models in it."""
    (tmp_path / "home").mkdir()
    shutil.copyfile(shop.folder / "fresh.db", tmp_path / "home" / "mlflow.db")
    return Registry.from_settings()


def served(shop: Shop, *names: str, memory_mib: int | None = None, **model: Any) -> ModelServer:
    """A server of these models, registered now; small caches so that the test takes little memory."""
    references = [register(shop.folder / name, name).reference for name in names]
    options = {"cache_mib": 4, "engine": "auto", **model}
    config = ServerConfig(
        models=tuple(ModelConfig(reference=reference, **options) for reference in references),
        memory_mib=memory_mib,
        preload=False,
        threads=1,
        room_timeout_s=5,
    )
    return ModelServer(config, Registry.from_settings(), BARE)


def run(server: ModelServer, work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            return await asyncio.wait_for(work(), 60)
        finally:
            await server.close()

    return asyncio.run(main())


def call(prompt: Any = None, **options: Any) -> Generation:
    sampling = {"max_tokens": TOKENS, "temperature": 0.0}
    sampling |= {k: options.pop(k) for k in list(options) if k in Sampling.__dataclass_fields__}
    return Generation(request_id="r", sampling=Sampling(**sampling), prompt=prompt, **options)  # type: ignore[arg-type]


async def pieces(server: ModelServer, model: str, given: Generation) -> list[Piece]:
    return [piece async for piece in server.generate(model, given)]


def text(found: Sequence[Piece], index: int = 0) -> str:
    return "".join(piece.text for piece in found if piece.index == index)


def answers(server: ModelServer, model: str, *calls: Generation) -> list[list[Piece]]:
    async def work() -> list[list[Piece]]:
        return [await pieces(server, model, one) for one in calls]

    found: list[list[Piece]] = run(server, work)
    return found


def plain_text(folder: Path, prompt_ids: Sequence[int], tokens: int = TOKENS) -> str:
    decoded: str = load_tokenizer(folder).decode(greedy(folder, prompt_ids, tokens), skip_special_tokens=True)
    return decoded


def test_a_completion_is_the_model_s_greedy_continuation_with_its_usage(shop: Shop) -> None:
    folder = shop.folder / "tiny0"
    ids = load_tokenizer(folder)("The quick").input_ids
    (found,) = answers(served(shop, "tiny0"), "tiny0", call("The quick"))
    assert text(found) == plain_text(folder, ids)
    assert found[0].text == ""
    assert found[0].usage is not None
    assert found[0].usage.prompt_tokens == len(ids)
    assert found[-1].finish_reason in ("length", "stop")
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens == len(greedy(folder, ids, TOKENS))
    assert [piece.finish_reason for piece in found[:-1]] == [None] * (len(found) - 1)


def test_a_chat_goes_through_the_model_s_template(shop: Shop) -> None:
    folder = shop.folder / "tiny0"
    ids = load_tokenizer(folder)("<|user|>The quick fox 東京<|end|><|assistant|>").input_ids
    in_parts = [
        {"role": "user", "content": [{"type": "text", "text": "The quick "}, {"type": "text", "text": "fox 東京"}]}
    ]
    found, same = answers(served(shop, "tiny0"), "tiny0", call(messages=CHAT), call(messages=in_parts))
    assert text(found) == text(same) == plain_text(folder, ids)


def test_a_model_without_a_template_gets_lines_and_stops_before_the_user_s_next_one(shop: Shop) -> None:
    folder = shop.folder / "plain"
    ids = load_tokenizer(folder)("user: The quick fox 東京\nassistant:").input_ids
    (found,) = answers(served(shop, "plain"), "plain", call(messages=CHAT))
    assert text(found) == plain_text(folder, ids).split("\nuser:")[0]


def test_a_prompt_longer_than_the_context_is_refused_with_numbers(shop: Shop) -> None:
    server = served(shop, "tiny0")
    with pytest.raises(InputError, match=rf"the prompt has {CONTEXT} tokens.*takes {CONTEXT}"):
        answers(server, "tiny0", call([5] * CONTEXT))


def test_an_answer_is_cut_to_what_the_context_leaves(shop: Shop) -> None:
    (found,) = answers(served(shop, "tiny1"), "tiny1", call([5, 6, 7] * 84, max_tokens=10_000))
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens <= CONTEXT - 252
    assert found[-1].finish_reason is not None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (call(""), "the prompt is empty"),
        (call([99_999]), "token 99999"),
        (call("a", max_tokens=0), "max_tokens=0"),
        (call(messages=[]), "no messages"),
        (call(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "image_url"),
        (call("a", json_schema={"type": "object"}), "no json_schema"),
        (call(), "neither messages nor a prompt"),
    ],
)
def test_a_call_that_can_never_work_is_refused(shop: Shop, given: Generation, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        answers(served(shop, "tiny0"), "tiny0", given)


def test_a_stop_string_split_over_tokens_ends_the_answer_and_frees_the_engine(shop: Shop) -> None:
    folder = shop.folder / "tiny0"
    tokenizer = load_tokenizer(folder)
    whole = plain_text(folder, tokenizer("The quick").input_ids, 60)
    single = {tokenizer.decode([n]) for n in range(len(tokenizer))}
    stop = next(s for at in range(5, len(whole)) if (s := whole[at : at + 5]) not in single and whole.find(s) == at)
    server = served(shop, "tiny0")

    async def work() -> tuple[list[Piece], int, int]:
        found = await pieces(server, "tiny0", call("The quick", max_tokens=60, stop=(stop, "never there")))
        while server.stats()["tiny0"].running:
            await asyncio.sleep(0.005)
        return found, server.stats()["tiny0"].generated_tokens, server.stats()["tiny0"].waiting

    found, generated, waiting = run(server, work)
    expected = whole[: whole.find(stop)]
    shown = ""
    for piece in found:
        shown += piece.text
        assert expected.startswith(shown)
    assert shown == expected
    assert found[-1].finish_reason == "stop"
    assert (generated < 60, waiting) == (True, 0)


def test_choices_come_from_seeds_of_their_own_and_the_same_call_gives_the_same_ones(shop: Shop) -> None:
    given = call("The quick", temperature=1.2, seed=5, num_choices=3)
    single = call("The quick", temperature=1.2, seed=6)
    first, again, second_choice = answers(served(shop, "tiny0"), "tiny0", given, given, single)
    texts = [text(first, index) for index in range(3)]
    assert len(set(texts)) == 3
    assert texts == [text(again, index) for index in range(3)]
    assert texts[1] == text(second_choice)
    reasons = [piece for piece in first if piece.finish_reason is not None]
    assert sorted(piece.index for piece in reasons) == [0, 1, 2]
    assert [piece.usage is not None for piece in first] == [True] + [False] * (len(first) - 2) + [True]


def test_echo_puts_the_prompt_before_every_choice(shop: Shop) -> None:
    plain, echoed = answers(
        served(shop, "tiny0"),
        "tiny0",
        call("The quick", num_choices=2),
        call("The quick", num_choices=2, echo=True),
    )
    for index in range(2):
        assert text(echoed, index) == "The quick" + text(plain, index)


def test_log_probabilities_are_text_and_bytes_of_a_plain_forward_pass(shop: Shop) -> None:
    folder = shop.folder / "tiny0"
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("東京 The").input_ids
    (found,) = answers(served(shop, "tiny0"), "tiny0", call("東京 The", top_logprobs=3))
    logprobs = [one for piece in found for one in piece.logprobs]
    answer = greedy(folder, ids, TOKENS)
    expected = log_probabilities(load_model(folder)[1].float(), ids, answer)
    assert len(logprobs) == len(answer)
    assert b"".join(one.token_bytes for one in logprobs).decode(errors="replace") == text(found)
    for place, one in enumerate(logprobs):
        assert one.logprob == pytest.approx(float(expected[place, answer[place]]), abs=1e-4)
        assert [value for _, _, value in one.top] == pytest.approx(expected[place].topk(3).values.tolist(), abs=1e-4)
        assert one.top[0][:2] == (one.token, one.token_bytes)  # greedy: the chosen one is the likeliest


def test_closing_the_iterator_frees_the_slot_within_a_second(shop: Shop) -> None:
    server = served(shop, "tiny1")

    async def work() -> None:
        stream = server.generate("tiny1", call([5, 6], max_tokens=250, num_choices=2))
        await anext(stream)
        await anext(stream)
        assert server.stats()["tiny1"].running == 2
        await stream.aclose()
        async with asyncio.timeout(1):
            while server.stats()["tiny1"].running:
                await asyncio.sleep(0.005)

    run(server, work)


def test_beyond_the_queue_calls_are_refused_with_a_time_to_come_back(shop: Shop) -> None:
    server = served(shop, "tiny1", max_sequences=1, max_waiting=1)

    async def work() -> None:
        streams = [server.generate("tiny1", call([5, n], max_tokens=200)) for n in (6, 7)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(OverloadedError, match="2 is the most") as caught:
            await pieces(server, "tiny1", call([5]))
        assert caught.value.retry_after_s > 0
        for stream in streams:
            await stream.aclose()
        assert await pieces(server, "tiny1", call([5]))  # and there is room again

    run(server, work)


def test_embeddings_are_unit_vectors_and_a_text_is_its_own_nearest(shop: Shop) -> None:
    server = served(shop, "tiny0")
    texts = ["The quick brown fox", "Models answer", "The quick brown fox jumps", [5, 6, 7]]
    vectors, usage = run(server, lambda: server.embed("tiny0", texts))
    assert [math.fsum(x * x for x in vector) for vector in vectors] == pytest.approx([1.0] * 4, abs=1e-5)
    first, second, third = (np.array(vectors[n]) for n in range(3))
    assert first @ third > first @ second
    assert usage.prompt_tokens == sum(len(load_tokenizer(shop.folder / "tiny0")(t).input_ids) for t in texts[:3]) + 3
    with pytest.raises(InputError, match=r"text 1 has 0 tokens"):
        run(served(shop, "tiny0"), lambda: server.embed("tiny0", ["a", ""]))


def test_a_classifier_answers_images_as_its_task_does(shop: Shop) -> None:
    server = served(shop, "digits")
    images = np.random.default_rng(0).integers(0, 255, (5, 8, 8)).astype(np.uint8)

    async def work() -> list[Any]:
        with_channel = server.predict("digits", [image[:, :, None] for image in images])
        return list(await asyncio.gather(server.predict("digits", list(images)), with_channel))

    plain, with_channel = run(server, work)
    task, model = load_model(shop.folder / "digits")
    expected = task.predict(model, [image[None] for image in images])
    for got in (plain, with_channel):
        assert [one["label"] for one in got] == [one["label"] for one in expected]
        assert [one["probability"] for one in got] == pytest.approx([one["probability"] for one in expected], abs=1e-5)
    with pytest.raises(InputError, match="shape"):
        run(served(shop, "digits"), lambda: server.predict("digits", [np.zeros((3, 3), np.uint8)]))


def test_models_are_listed_with_what_they_can_do(shop: Shop, registry: Registry) -> None:
    server = served(shop, "tiny0", "digits")
    language, images = run(server, server.models)
    assert (language.name, language.reference, language.task) == ("tiny0", "models:/tiny0/1", "causal_lm")
    assert (language.engine, language.context_tokens) == ("transformers", CONTEXT)
    assert {"seed", "logprobs", "embeddings"} <= language.features
    assert abs(language.created_s - images.created_s) < 3600
    assert (images.name, images.task, images.engine, images.context_tokens) == (
        "digits",
        "image_classification",
        "batch",
        None,
    )


def test_wrong_names_and_wrong_tasks_are_refused(shop: Shop) -> None:
    server = served(shop, "tiny0", "digits")

    async def work() -> None:
        with pytest.raises(NotFoundError, match="did you mean 'tiny0'"):
            await pieces(server, "tiny9", call("a"))
        with pytest.raises(InputError, match="image_classification"):
            await pieces(server, "digits", call("a"))
        with pytest.raises(InputError, match="causal_lm"):
            await server.predict("tiny0", [np.zeros((8, 8), np.uint8)])

    run(server, work)


def test_a_damaged_model_is_not_served(shop: Shop, registry: Registry) -> None:
    server = served(shop, "tiny0")
    _, folder = registry.open("models:/tiny0")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        run(server, server.start)


def test_two_models_of_one_name_are_refused(shop: Shop) -> None:
    register(shop.folder / "tiny0", "a")
    register(shop.folder / "tiny1", "b")
    models = (ModelConfig(reference="models:/a", name="b"), ModelConfig(reference="models:/b"))
    server = ModelServer(ServerConfig(models=models), Registry.from_settings(), BARE)
    with pytest.raises(ConfigError, match="two are named 'b'"):
        run(server, server.start)


def model_mib(shop: Shop) -> int:
    """What one of the tiny models takes by the server's own count."""
    from modelyard.serving.loading import describe

    reference = register(shop.folder / "tiny0", "tiny0").reference
    entry = describe(ModelConfig(reference=reference, cache_mib=4), Registry.from_settings(), BARE)
    return -(-entry.size_bytes >> 20)


def test_the_longest_idle_model_makes_room(shop: Shop) -> None:
    server = served(shop, "tiny0", "tiny1", "tiny2", memory_mib=2 * model_mib(shop) + 3)

    async def work() -> None:
        for name, loaded in [
            ("tiny0", ["tiny0"]),
            ("tiny1", ["tiny0", "tiny1"]),
            ("tiny0", ["tiny1", "tiny0"]),
            ("tiny2", ["tiny0", "tiny2"]),
        ]:
            await pieces(server, name, call("a", max_tokens=2))
            assert list(server.loaded) == loaded

    run(server, work)


def test_a_busy_model_is_never_unloaded_and_the_next_one_waits_for_it(shop: Shop) -> None:
    server = served(shop, "tiny1", "tiny2", memory_mib=model_mib(shop) + 3)

    async def work() -> None:
        busy = server.generate("tiny1", call([5, 6], max_tokens=240))
        first = [await anext(busy), await anext(busy)]
        other = asyncio.create_task(pieces(server, "tiny2", call("a", max_tokens=2)))
        rest = [piece async for piece in busy if server.loaded == ("tiny1",)]
        assert (await other)[-1].finish_reason is not None
        assert server.loaded == ("tiny2",)
        assert text([*first, *rest]) == plain_text(shop.folder / "tiny1", [5, 6], 240)

    run(server, work)


def test_when_busy_models_leave_no_room_in_time_the_call_is_told_to_come_back(shop: Shop) -> None:
    server = served(shop, "tiny1", "tiny2", memory_mib=model_mib(shop) + 3)
    server._residents._room_timeout_s = 0.05

    async def work() -> None:
        busy = server.generate("tiny1", call([5, 6], max_tokens=240))
        await anext(busy)
        with pytest.raises(OverloadedError, match="room_timeout_s"):
            await pieces(server, "tiny2", call("a", max_tokens=2))
        await busy.aclose()

    run(server, work)


def test_a_model_larger_than_the_budget_is_refused_with_both_numbers(shop: Shop) -> None:
    server = served(shop, "tiny0", memory_mib=2)
    with pytest.raises(CapacityError, match="memory_mib is 2"):
        answers(server, "tiny0", call("a"))


def test_calls_that_come_while_a_model_loads_share_the_load(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelyard.serving import loading

    loads = []
    real = loading.load
    monkeypatch.setattr(loading, "load", lambda *args: (loads.append(1), real(*args))[1])
    server = served(shop, "tiny0")

    async def work() -> list[Any]:
        found = await asyncio.gather(*(pieces(server, "tiny0", call("a", max_tokens=3)) for _ in range(4)))
        leaving = asyncio.create_task(pieces(server, "tiny0", call("a")))
        await asyncio.sleep(0)
        leaving.cancel()
        return found

    found = run(server, work)
    assert len(loads) == 1
    assert len({text(one) for one in found}) == 1


def test_a_model_that_fails_to_load_is_tried_again_by_the_next_call(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelyard.serving import loading

    real = loading.load
    server = served(shop, "tiny0")

    async def work() -> None:
        monkeypatch.setattr(loading, "load", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await pieces(server, "tiny0", call("a"))
        monkeypatch.setattr(loading, "load", real)
        assert await pieces(server, "tiny0", call("a", max_tokens=2))

    run(server, work)


def test_a_load_that_failed_when_nobody_waited_any_more_is_forgotten() -> None:
    async def main() -> None:
        residents = Residents(None, room_timeout_s=1)
        go, tries = asyncio.Event(), 0

        class Model:
            async def close(self) -> None:
                pass

        async def load() -> Model:
            nonlocal tries
            tries += 1
            await go.wait()
            if tries == 1:
                raise InputError("broken")
            return Model()

        async def use() -> bool:
            async with residents.use("m", 1, load) as model:
                return isinstance(model, Model)

        first = asyncio.create_task(use())
        while not tries:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        go.set()
        while residents.loaded("m") is None and not residents._seats["m"].failed:
            await asyncio.sleep(0)
        assert await use()
        assert tries == 2
        await residents.close()
        assert residents.names == ()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_closed_server_ends_its_calls_with_an_error(shop: Shop) -> None:
    server = served(shop, "tiny1")

    async def work() -> None:
        stream = server.generate("tiny1", call([5, 6], max_tokens=250))
        await anext(stream)
        await anext(stream)
        await server.close()
        with pytest.raises(UnavailableError):
            async for _ in stream:
                pass

    run(server, work)


def test_a_lora_adapter_is_merged_when_its_model_is_served(shop: Shop, tmp_path: Path) -> None:
    from modelyard.tasks import CausalLM
    from modelyard.tasks.lora import Lora, save_adapter

    folder = shutil.copytree(shop.folder / "tiny0", tmp_path / "adapted")
    base = load_model(folder)[1]
    wrapped: Any = Lora(rank=4, merge_at_end=False).wrap(base)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(wrapped, wrapped.state_dict(), folder)
    assert isinstance(load_model(folder)[0], CausalLM)
    ids = load_tokenizer(folder)("The quick").input_ids
    given = torch.tensor([ids])
    with torch.inference_mode():
        out = wrapped.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS, do_sample=False
        )[0, len(ids) :].tolist()
    register(folder, "adapted")
    config = ServerConfig(models=(ModelConfig(reference="models:/adapted", cache_mib=4),), preload=False)
    (found,) = answers(ModelServer(config, Registry.from_settings(), BARE), "adapted", call("The quick"))
    expected = load_tokenizer(folder).decode(out[: out.index(0)] if 0 in out else out)
    assert text(found) == expected
    assert expected != plain_text(shop.folder / "tiny0", ids)


def test_openvino_is_chosen_where_it_is_installed_and_its_export_is_kept(shop: Shop, tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai", reason="needs the extra openvino")
    reference = register(shop.folder / "tiny0", "tiny0").reference
    config = ServerConfig(models=(ModelConfig(reference=reference, cache_mib=4),), preload=True, threads=1)
    texts, times = [], []
    for _ in range(2):
        server = ModelServer(config, Registry.from_settings(), Machine(frozenset({"openvino_genai", "gguf"})))
        (found,) = answers(server, "tiny0", call("The quick", max_tokens=4))
        texts.append(text(found))
        (file,) = (tmp_path / "home" / "cache" / "gguf").iterdir()
        times.append(file.stat().st_mtime_ns)
    assert texts[0] == texts[1] != ""
    assert times[0] == times[1]
