"""`modelyard predict`: ask a registered model."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("predict")
@click.argument("ref")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest text; default 64, or half the context.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0: no sampling.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Nucleus to sample from.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same text.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write each answer here as NUMBER.json, drawn as NUMBER.png where its task can.",
)
def predict_command(
    ref: str,
    inputs: tuple[str, ...],
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    out: Path | None,
) -> None:
    """Answer INPUTS with the model REF: texts, files of pictures or sound, or JSON, as its task takes them."""
    from modelyard.artifacts.registry import Registry
    from modelyard.errors import ConfigError
    from modelyard.tasks import CausalLM, load_model

    _, folder = Registry.from_settings().open(ref, kind="model")
    task, model = load_model(folder)
    if isinstance(task, CausalLM):
        if out is not None:
            raise ConfigError(f"--out={out}: {ref} goes on with a text, which is printed", "leave --out away")
        context = getattr(model.config, "max_position_embeddings", None) or 128
        length = max_new_tokens or min(64, max(1, int(context) // 2))
        options = {"max_new_tokens": length, "temperature": temperature, "top_p": top_p, "seed": seed}
        for prompt, answer in zip(inputs, task.predict(model, inputs, **options), strict=True):
            click.echo(click.style(prompt, bold=True) + answer)
        return
    given = [task.parse_input(text) for text in inputs]
    for number, (text, value, answer) in enumerate(zip(inputs, given, task.predict(model, given), strict=True), 1):
        written = json.dumps(answer, default=str)
        if out is None:
            click.echo(f"{text}: {written}")
            continue
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{number}.json").write_text(written + "\n", encoding="utf-8")
        names = [f"{number}.json"]
        if (drawn := task.draw(value, answer)) is not None:
            drawn.save(out / f"{number}.png")
            names.append(f"{number}.png")
        click.echo(f"{text}: {', '.join(str(out / name) for name in names)}")
