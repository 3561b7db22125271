"""Coloured objects, with one example before the question: the other task of circuit reuse (arXiv:2310.08744).

    Q : On the desk , I see a red pen , an orange cup , and a blue book . What color is the cup ? A : Orange
    Q : On the table , there is a green key , a black coin , and a pink ring . What color is the ring ? A :   ->  Pink

In the corrupted prompt the question of the second scene is about another of its objects. Words are token ids of their
own vocabulary; `text` gives them to another tokenizer. After the task of the same name in BIG-bench, as the paper has
it.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.registry import Cost, Kind, Paper, Source, register
from attnlab.tasks.words import Words, asked_at_the_end

COLORS = ("red", "orange", "yellow", "green", "blue", "brown", "black", "pink")
OBJECTS = ("pen", "pencil", "cup", "plate", "book", "key", "coin", "ring", "ball", "phone", "watch", "bottle", "scarf")
OBJECTS += ("hat", "lamp", "brush", "stick")
SURFACES, OPENINGS = ("table", "desk", "floor"), ("there is", "you see", "I see")
FRAME = ("Q", ":", "On", "the", ",", "there", "is", "you", "I", "see", "a", "an", "and", ".", "What", "color", "?", "A")
ANSWERS = tuple(color.capitalize() for color in COLORS)
WORDS = Words.of(FRAME, SURFACES, COLORS, ANSWERS, OBJECTS)
PROMPT = 59


@register(
    "circuit_reuse.colored_objects",
    kind=Kind.TASK,
    paper=Paper(
        "Circuit Component Reuse Across Tasks in Transformer Language Models",
        "Merullo et al.",
        2024,
        "2310.08744",
        number=86,
    ),
    source=Source.PAPER_TEXT,
    cost=Cost("O(N)", "O(N)"),
    summary="which colour an object has among three that were named, after one example",
    small={"length": 60},
)
@dataclasses.dataclass(frozen=True)
class ColoredObjects:
    """The task; see the module docstring.

    Attributes:
      length: inputs N, at least 59; shorter prompts are padded on the left.
    """

    length: int = PROMPT

    vocab_size: ClassVar[int] = len(WORDS)

    def __post_init__(self) -> None:
        if self.length < PROMPT:
            raise ValueError(f"length must be at least {PROMPT}, got {self.length}")

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32: 1 for the answer."""
        prompts, answers = [], []
        for _ in range(batch):
            (example, shown), (question, answer) = (_scene(generator) for _ in range(2))
            prompts.append((*example, shown, *question))
            answers.append(answer)
        return asked_at_the_end(WORDS, prompts, answers, self.length)

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N): the next words, and at the end the object's colour."""
        return np.concatenate([inputs[:, 1:], self.answers(inputs)[:, :1]], 1)

    def answers(self, inputs: np.ndarray) -> np.ndarray:
        """The right answer and those of the other two objects of the scene, (B, 3) int32."""
        colors, objects = _of_scene(inputs)
        asked = objects == inputs[:, -4, None]
        right, others = colors[asked][:, None], colors[~asked].reshape(len(inputs), 2)
        shift = WORDS.words.index(ANSWERS[0]) - WORDS.words.index(COLORS[0])
        return np.concatenate([right, others], 1).astype(np.int32) + shift

    def corrupted(self, inputs: np.ndarray) -> np.ndarray:
        """The prompts that ask for the next object of the scene."""
        objects, other = _of_scene(inputs)[1], np.array(inputs)
        asked = (objects == inputs[:, -4, None]).argmax(1)
        other[:, -4] = np.take_along_axis(objects, (asked[:, None] + 1) % 3, 1)[:, 0]
        return other

    def text(self, ids: np.ndarray) -> str:
        """The words of one sequence of token ids."""
        return WORDS.text(ids)


def _scene(generator: np.random.Generator) -> tuple[list[str], str]:
    """A question of 29 words, and its answer."""
    colors = [COLORS[i] for i in generator.choice(len(COLORS), 3, replace=False)]
    objects = [OBJECTS[i] for i in generator.choice(len(OBJECTS), 3, replace=False)]
    surface, opening = SURFACES[generator.integers(3)], OPENINGS[generator.integers(3)]
    asked = int(generator.integers(3))
    articles = ["an" if color[0] in "aeiou" else "a" for color in colors]
    named = list(zip(articles, colors, objects, strict=True))
    words = ["Q", ":", "On", "the", surface, ",", *opening.split(), *named[0], ",", *named[1], ",", "and", *named[2]]
    words += [".", "What", "color", "is", "the", objects[asked], "?", "A", ":"]
    return words, colors[asked].capitalize()


def _of_scene(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours and objects (B, 3) of the last scene."""
    return inputs[:, [-20, -16, -11]], inputs[:, [-19, -15, -10]]
