"""Flow-Attention: what is conserved."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.linear.flowformer import flow_features


def test_what_flows_into_a_sink_is_its_allocation_and_sources_compete_for_it():
    """Without competition every sink takes in one whole; with it, keys are weighted with mean 1."""
    q, k = (jax.nn.sigmoid(jax.random.normal(jax.random.key(i), (2, n, 3, 8))) for i, n in enumerate((20, 33)))
    sinks, sources, _ = flow_features(q, k)
    share = (sources / k)[..., 0]
    np.testing.assert_allclose(sources / k, np.broadcast_to(share[..., None], k.shape), rtol=1e-5)
    np.testing.assert_allclose(share.mean(1), 1, rtol=1e-5)
    inflow = jnp.einsum("bnhd,bmhd->bnh", sinks, k)
    outgoing = 1 / jnp.einsum("bmhd,bnhd->bmh", k, q)
    received = jnp.einsum("bnhd,bmhd,bmh->bnh", q, k, outgoing)
    np.testing.assert_allclose(inflow, jax.nn.sigmoid(received * 20 / 33), atol=1e-4)
