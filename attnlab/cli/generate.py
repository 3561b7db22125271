"""`attnlab generate`: continues a prompt with a trained language model."""

import dataclasses
import sys
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt with the language model of a run.

    Attributes:
      run_dir: directory of a run of `attnlab train`.
      prompt: text to continue.
      max_new_tokens: most tokens (bytes) to generate.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens.
      top_p: sample among the most likely tokens whose probabilities reach p.
      stop: texts at which the continuation ends, before the first that appears.
      stop_tokens: further token ids that end it, besides the end of text.
      seed: of the sampling.
      step: number of steps of the checkpoint to load; the newest when None.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    prompt: str
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0
    step: int | None = None


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab generate --help`."""
    options = tyro.cli(GenerateOptions, args=arguments, prog="attnlab generate")
    print(options.prompt + continuation(options))
    return 0


def continuation(options: GenerateOptions) -> str:
    """The text that follows the prompt.

    Raises:
      FileNotFoundError: if the directory holds no run, or no such checkpoint.
      ValueError: if the run is not of a language model, or an option is out of its range.
    """
    import jax
    import numpy as np

    from attnlab import experiment
    from attnlab.cli import qualify
    from attnlab.data.tokenizer import END_OF_TEXT, decode, encode
    from attnlab.models.generate import generate

    config, info = experiment.load(options.run_dir)
    if config.model.kind != "text":
        raise ValueError(f"{options.run_dir} holds a {type(config.model).__name__} on {info.name}, no language model")
    if not options.prompt:
        raise ValueError("--prompt must hold at least one character")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must lie in 0..2**32 - 1, not {options.seed}")
    if "" in options.stop:
        raise ValueError("--stop must not hold an empty text")
    qualify.on_new_device()
    model = experiment.load_trained(options.run_dir, step="newest" if options.step is None else options.step)
    generation = generate(
        model,
        encode(options.prompt)[None],
        max_new_tokens=options.max_new_tokens,
        key=jax.random.key(options.seed),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_tokens=(END_OF_TEXT, *options.stop_tokens),
        pad_token=END_OF_TEXT,
    )
    tokens = np.asarray(generation.tokens[0])[: int(generation.lengths[0])]
    if len(tokens) and int(tokens[-1]) in options.stop_tokens:
        tokens = tokens[:-1]
    text = decode(tokens).decode(errors="replace")
    ends = [text.index(stop) for stop in options.stop if stop in text]
    if not sys.stdout.encoding.lower().startswith("utf"):
        text = text.encode(sys.stdout.encoding, errors="replace").decode(sys.stdout.encoding)
    return text[: min(ends)] if ends else text
