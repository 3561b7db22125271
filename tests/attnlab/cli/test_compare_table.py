"""The table that `attnlab compare` prints."""

from attnlab.cli.compare import print_table
from attnlab.compare.results import Comparison, Entry


def test_text_is_text(capsys):
    """A title or a reason with brackets and colons is no markup and no emoji."""
    numbers = {"parameters": 1, "quality": 0.5, "loss": 1.0, "steps": 1, "seconds": 1.0}
    entries = (
        Entry("softmax_attention", "done", **numbers, steps_per_second=1.0, items_per_second=1.0),
        Entry("hedgehog", "failed", reason="[red]no[/red] :smile:"),
    )
    title = "ViT [/8] against [bold] :smile:"
    print_table(Comparison(title, "image", {}, {}, {}, {}, entries))
    out = capsys.readouterr().out
    assert title in out
    assert "hedgehog was not trained: [red]no[/red] :smile:" in out
