"""Link prediction on a graph of mixed shape: a tree, a cycle and a grid, as different geometries embed them.

A tree grows exponentially with the distance, as hyperbolic space does; a cycle closes, as a sphere does; a grid is
flat. The curvature-adaptive transformer (arXiv:2510.01634) is meant for graphs that are all of these; this graph is
ours, since the paper's own (of WordNet and Freebase) are no synthetic ones.

Inputs are pairs of nodes, one after the other, of which half are linked; behind both nodes of a pair the target is
whether they are. For rankings (`ranks`) a model scores every pair, and a node's true neighbour is compared with the
nodes that are none.
"""

import dataclasses
import functools

import numpy as np

from attnlab.attention.dense.cat_curvature import PAPER
from attnlab.registry import Cost, Kind, Source, register


@register(
    "cat_curvature.links",
    kind=Kind.TASK,
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    cost=Cost(time="O(N)", memory="O(V²)"),
    summary="are two nodes linked, in a graph that is a tree, a cycle and a grid side by side",
    small={"tree": 7, "cycle": 5, "rows": 2, "columns": 3, "length": 6},
)
@dataclasses.dataclass(frozen=True)
class LinkPrediction:
    """The task; see the module docstring. Nodes are numbered through tree, cycle and grid.

    Attributes:
      tree: nodes of a tree, of which each has so many children until there are enough.
      branching: children of a node.
      cycle: nodes of a cycle.
      rows: of a grid.
      columns: of it.
      length: tokens of an example, two for each pair.

    Raises:
      ValueError: for an odd length, or a graph without links.
    """

    tree: int = 60
    branching: int = 2
    cycle: int = 60
    rows: int = 6
    columns: int = 10
    length: int = 2

    def __post_init__(self) -> None:
        if self.length < 2 or self.length % 2:
            raise ValueError(f"length must be even, two tokens for each pair, got {self.length}")
        if min(self.tree, self.cycle, self.rows, self.columns) < 0 or self.branching < 1 or not len(self.edges()):
            raise ValueError(f"the graph must have links, got {self}")

    @property
    def vocab_size(self) -> int:
        """Number of nodes V."""
        return self.tree + self.cycle + self.rows * self.columns

    def parts(self) -> np.ndarray:
        """Of each node: 0 in the tree, 1 in the cycle, 2 in the grid; `(V,)`."""
        return np.repeat([0, 1, 2], [self.tree, self.cycle, self.rows * self.columns])

    def edges(self) -> np.ndarray:
        """All links, `(E, 2)` int32, the lower node first."""
        child = np.arange(1, self.tree)
        links = [np.stack([(child - 1) // self.branching, child], 1)]
        if self.cycle > 2:
            node = np.arange(self.cycle)
            links.append(self.tree + np.sort(np.stack([node, (node + 1) % self.cycle], 1), 1))
        grid = self.tree + self.cycle + np.arange(self.rows * self.columns).reshape(self.rows, self.columns)
        links += [np.stack([a.ravel(), b.ravel()], 1) for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:]))]
        return np.concatenate(links).astype(np.int32)

    def split(self, generator: np.random.Generator, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
        """Links to train on and a part `share` of them, rounded up, to be predicted."""
        links = generator.permutation(self.edges())
        held = int(np.ceil(share * len(links)))
        return links[held:], links[:held]

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, length) int32, and the weight of each target (batch, length) float32."""
        linked, apart = _pairs(self)
        shape = (batch, self.length // 2)
        positive = generator.random(shape) < 0.5
        chosen = [pairs[generator.integers(len(pairs), size=shape)] for pairs in (linked, apart)]
        inputs = np.where(positive[..., None], *chosen).reshape(batch, self.length).astype(np.int32)
        weight = np.tile(np.asarray([0, 1], np.float32), (batch, self.length // 2))
        return {"inputs": inputs, "targets": self.oracle(inputs), "weight": weight}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """At every second token whether the two are linked, and 0 at the others, for inputs (B, length)."""
        targets = np.zeros(inputs.shape, np.int32)
        targets[:, 1::2] = _adjacency(self)[inputs[:, ::2], inputs[:, 1::2]]
        return targets

    def ranks(self, scores: np.ndarray, links: np.ndarray) -> np.ndarray:
        """The place of each link's second node among those that the first could be linked to, from both ends.

        Args:
          scores: `(V, V)`, the higher the likelier.
          links: `(E, 2)`.

        Returns:
          `(2 E,)`, 1 for the best place; of equal scores half count as better. Other neighbours are left out, and so is
          the node itself. The mean of 1 / rank is the MRR, the share of ranks up to 10 Hits@10.
        """
        heads, tails = np.concatenate([links, links[:, ::-1]]).T
        true = scores[heads, tails][:, None]
        others = ~_adjacency(self)[heads]
        others[np.arange(len(heads)), heads] = False
        rivals = scores[heads]
        return 1 + ((rivals > true) & others).sum(1) + 0.5 * ((rivals == true) & others).sum(1)


@functools.lru_cache(maxsize=8)
def _adjacency(task: LinkPrediction) -> np.ndarray:
    linked = np.zeros((task.vocab_size,) * 2, bool)
    low, high = task.edges().T
    linked[low, high] = linked[high, low] = True
    return linked


@functools.lru_cache(maxsize=8)
def _pairs(task: LinkPrediction) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that are linked, and pairs of different nodes that are not, in both orders."""
    linked = _adjacency(task)
    return np.argwhere(linked), np.argwhere(~linked & ~np.eye(len(linked), dtype=bool))
