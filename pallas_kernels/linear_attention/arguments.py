"""What linear attention alone does with its arguments: feature maps, and segments without an order."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.recurrence import Arguments, accumulator

FeatureMap = Callable[[jax.Array], jax.Array]


def apply_feature_map(feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None, q: jax.Array, k: jax.Array):
    """Features of q and k: mapped in the accumulator dtype, then rounded to the dtype of the inputs.

    Raises:
      TypeError: if `feature_map` is neither None, a callable nor a pair of callables.
      ValueError: if the map changes anything but the last axis.
    """
    if feature_map is None:
        return q, k
    maps = feature_map if isinstance(feature_map, tuple | list) else (feature_map, feature_map)
    if len(maps) != 2 or not all(callable(f) for f in maps):
        raise TypeError(f"feature_map must be None, a callable, or a pair (map of q, map of k), got {feature_map!r}")
    mapped = []
    for name, f, x in (("q", maps[0], q), ("k", maps[1], k)):
        y = f(x.astype(accumulator(x.dtype)))
        if y.ndim != x.ndim or y.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"feature_map may change the last axis alone, but it took {name} from {x.shape} to {y.shape}"
            )
        mapped.append(y.astype(x.dtype))
    return mapped[0], mapped[1]


def in_order_of_ids(causal: Callable[..., jax.Array], args: Arguments, v: jax.Array) -> jax.Array:
    """Non-causal attention where a query reads the keys of its own id, wherever they stand, by a causal sweep.

    Keys and queries are laid out in one sequence sorted by id, keys before queries. There a causal sweep whose state is
    emptied at each new id has summed all keys of an id when it comes to that id's queries.

    Args:
      causal: (q, k, v, ids) of one length -> outputs (B, length, H, ...) of a causal sweep without decay.
      args: arguments with ids.
      v: values to read, (B, M, G, ...).
    """
    n, m = args.q.shape[1], args.k.shape[1]
    ids = jnp.concatenate([args.key_ids, args.query_ids], axis=1)
    order = jnp.argsort(ids, axis=1, stable=True)

    def sort(x, before, after):
        padded = jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0)))
        return jnp.take_along_axis(padded, order[:, :, None, None], axis=1)

    q, k, v = sort(args.q, m, 0), sort(args.k, 0, n), sort(v, 0, n)
    y = causal(q, k, v, jnp.take_along_axis(ids, order, axis=1))
    place = jnp.argsort(order, axis=1)[:, m:]
    return jnp.take_along_axis(y, place[:, :, None, None], axis=1)
