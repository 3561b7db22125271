import attnlab
from attnlab.cli import table


def test_table_of_variants_is_what_the_registry_says():
    readme = table.readme_path().read_text()
    fresh = table.with_table(readme, table.markdown(attnlab.variants()))
    assert readme == fresh, "the README's table of variants is stale: `make table` writes it anew"
