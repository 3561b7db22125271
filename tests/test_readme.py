import re

import jax
import jax.numpy as jnp
import pytest

import attnlab
from attnlab.cli import checkout

BLOCKS = re.findall(r"```python\n(.*?)```", (checkout.root() / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("imports", ["LightningAttention", "LanguageModel", "HeadScaling", "linear_attention("])
def test_python_of_the_readme_runs(imports):
    """All of it but the loading of published weights, whose file is not here."""
    block = next(block for block in BLOCKS if imports in block and "interop.load" not in block)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 20, 2, 4)) for key in keys)
    arrays = {"q": q, "k": k, "v": v, "log_decay": jnp.asarray([-0.1, -0.2]), "ids": jnp.zeros((1, 20), jnp.int32)}
    shorter = block.replace("max_new_tokens=100", "max_new_tokens=3").replace("features=256", "features=64")
    names = {"jax": jax, "jnp": jnp, "nnx": __import__("flax.nnx", fromlist=["nnx"]), **arrays}
    exec(compile(shorter, "README.md", "exec"), names)
    result = next(names[name] for name in ("y_t", "tokens", "y", "entropy") if name in names)
    assert jnp.isfinite(result).all()


def test_the_version_is_one():
    root = checkout.root()
    assert f"\nversion: {attnlab.__version__}\n" in (root / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)$", (root / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest[1] == attnlab.__version__
