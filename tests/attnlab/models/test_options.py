"""Options of models, read from their constructors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

from attnlab.models.agent_transformers import AgentSwin
from attnlab.models.inputs import Images
from attnlab.models.options import options_of, setting_type
from attnlab.models.vit import ViT


def test_options_of_a_family_follow_those_of_the_model():
    options = {option.name: option for option in options_of(AgentSwin)}
    assert list(options)[:3] == ["replaced", "num_agents", "agent_window"]
    assert options["replaced"].default == (None, None, None, 0)
    assert options["replaced"].type == tuple[int | None, ...]
    assert options["patch_size"].words == "pixels on a side of a patch."
    assert not {"mixers", "image_size", "num_classes", "channels", "rngs", "dtype"} & set(options)


def test_words_of_several_lines_are_one():
    words = {option.name: option.words for option in options_of(AgentSwin)}["agent_window"]
    assert words.startswith("tokens on a side of the windows of agent attention, clipped to the stage's grid (56 at")
    assert "\n" not in words and words.endswith("shifted by half a window.")


def test_an_argument_without_words_is_refused():
    class Silent(ViT):
        """A model.

        Args:
          depth: blocks.
        """

        def __init__(self, *, depth: int = 1, width: int = 1):
            pass

    with pytest.raises(TypeError, match="docstring of Silent does not describe its argument width"):
        options_of(Silent)
    assert Images.sizes == ("image_size", "channels", "num_classes")


@pytest.mark.parametrize(
    ("annotation", "setting"),
    [
        (int | Sequence[int], int | tuple[int, ...]),
        (Sequence[int | None] | None, tuple[int | None, ...] | None),
        (Mapping[str, Mapping[str, Any]] | None, Mapping),
        (str | Sequence[str | Sequence[str]], str | tuple[str, ...]),
        (Literal["a", "b"], Literal["a", "b"]),
        (str | Callable[..., Any], None),
        (Any, None),
        (Sequence[Any], None),
    ],
)
def test_types_of_settings(annotation, setting):
    assert setting_type(annotation) == setting
