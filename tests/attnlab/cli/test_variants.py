from collections.abc import Callable, Sequence
from typing import Literal

import pytest
from jax.typing import ArrayLike

import attnlab
from attnlab.cli.describe import decode_bytes, options, signature, token_bytes
from attnlab.cli.main import main
from attnlab.cli.show_variant import facts
from attnlab.models import named_models
from pallas_kernels import dispatch


def test_list_prints_every_variant_under_its_kind_and_family(capsys):
    assert main(["list"]) == 0
    found, heading = {}, ""
    lines = capsys.readouterr().out.splitlines()
    for line in lines[:-3]:
        if line.startswith("    "):
            assert set(line.strip().split(", ")) <= set(named_models()), "the named sizes of a backbone"
        elif line.startswith("  "):
            name, summary = line.split(maxsplit=1)
            found[name] = heading
            assert summary.startswith(attnlab.get(name).summary)
        else:
            heading = line
    assert set(found) == set(attnlab.names())
    assert found["hedgehog"] == "mixer: linear"
    assert found["efficient_probing.aim"] == "pooling"
    assert found["tnl.transnormer"] == "backbone"
    assert lines[-1].startswith(f"{len(found)} variants")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--kind", "pooling"], {"kind": attnlab.Kind.POOLING}),
        (["--pattern", "causal-self"], {"pattern": attnlab.Pattern.CAUSAL_SELF}),
        (["--layout", "image", "--kind", "mixer"], {"layout": attnlab.Layout.IMAGE, "kind": attnlab.Kind.MIXER}),
        (["--family", "linear"], {"family": "linear"}),
        (["--source", "paper-text"], {"source": attnlab.Source.PAPER_TEXT}),
        (["--kernel", "linear_attention"], {"kernel": "linear_attention"}),
        (["zhang", "softmax"], {"search": "zhang softmax"}),
    ],
)
def test_list_filters(capsys, arguments, expected):
    assert main(["list", "--names", *arguments]) == 0
    names = capsys.readouterr().out.split()
    assert names and tuple(names) == attnlab.names(**expected) and len(names) < len(attnlab.names())


def test_list_refuses_an_unknown_filter(capsys):
    assert main(["list", "--kind", "mixr"]) == 2
    assert "did you mean mixer?" in capsys.readouterr().err
    assert main(["list", "--pattern", "casual-self"]) == 2
    assert "did you mean causal self" in capsys.readouterr().err


def test_list_of_nothing(capsys):
    assert main(["list", "porcupine", "vaswani"]) == 0
    assert capsys.readouterr().out.startswith("0 variants")


def test_list_suggests_an_option(capsys):
    assert main(["list", "--layuot", "image"]) == 2
    assert "--layout" in capsys.readouterr().err


def test_show_prints_what_the_registry_and_the_class_say(capsys):
    assert main(["show", "lightning_attention_2"]) == 0
    out = capsys.readouterr().out
    variant = attnlab.get("lightning_attention_2")
    for text in (variant.paper.title.split(":")[0], "arxiv.org/abs/2401.04658", variant.cost.time, "head_dim"):
        assert text in out
    assert "pallas_kernels.linear_attention" in out and "lightning_attention_2.py" in out


@pytest.mark.parametrize("variant", attnlab.variants(), ids=lambda variant: variant.name)
def test_every_variant_can_be_shown(variant):
    known = facts(variant)
    assert known["kind"] == variant.kind and variant.target.__qualname__ in " ".join(known.values())
    found = options(variant.target)
    undocumented = [option.name for option in found if not option.meaning.removesuffix("(a model fills it in)")]
    assert not undocumented, f"{variant.name} does not document {undocumented}"


def test_show_of_a_name_that_is_not_there(capsys):
    assert main(["show", "hedgehogg"]) == 2
    assert "did you mean hedgehog" in capsys.readouterr().err


def test_signatures_have_names_and_defaults_alone():
    def call(x: int, *rest: int, mask: list[int] | None = None, activation: object = len, **more: int) -> None: ...

    assert signature(call) == "(x, *rest, mask=None, activation=len, **more)"


def test_types_of_options_are_as_they_are_written():
    def call(
        x: ArrayLike,
        mask: ArrayLike | None = None,
        ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        sizes: Sequence[int] = (),
        grid: tuple[int, ...] | None = None,
        mode: Literal["a", "b"] = "a",
        layout: attnlab.Layout = attnlab.Layout.IMAGE,
        activation: Callable[[int], int] = abs,
        free=0,
    ) -> None: ...

    assert [option.type for option in options(call)] == [
        "ArrayLike",
        "ArrayLike | None",
        "ArrayLike | tuple[ArrayLike, ArrayLike] | None",
        "Sequence[int]",
        "tuple[int, ...] | None",
        "Literal['a', 'b']",
        "Layout",
        "Callable[[int], int]",
        "",
    ]


def test_bytes_of_the_decode_state():
    """A recurrent state of 4 heads of 64 × 64 in float32, caches of keys and values in bfloat16, and their order."""
    recurrent = decode_bytes(attnlab.get("lightning_attention_2"))
    assert len(set(recurrent.values())) == 1 and 0 <= recurrent[1024] - 4 * 64 * 64 * 4 <= 64
    cached = decode_bytes(attnlab.get("softmax_attention"))
    assert [0 <= size - length * 2 * 256 * 2 <= 64 + 16 * length for length, size in cached.items()] == [True, True]
    assert decode_bytes(attnlab.get("window_attention")) is None
    # Beside the keys and values a token has its position and label in the cache.
    assert token_bytes(attnlab.get("softmax_attention")) == f"{2 * 256 * 2 + 8:,} bytes a token and 8 bytes"
    assert token_bytes(attnlab.get("lightning_attention_2")) == f"{recurrent[1024]:,} bytes"
    assert token_bytes(attnlab.get("window_attention")) == ""


def test_doctor_explains_every_implementation(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for section in ("Versions", "Devices", "Kernels", "Extras"):
        assert section in out
    for op in dispatch.ops():
        for choice in dispatch.explain(op):
            (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{op}: {choice.name} ")]
            assert ("works" if choice.ok else choice.reason.split()[0]) in line
