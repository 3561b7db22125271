"""A prediction of numbers from a sequence of vectors, with any registered causal mixer in each layer.

Each vector is mapped to C channels, the blocks are those of `LanguageModel`, and the last token's channels are mapped
to the prediction: the model to compare mixers with on in-context regression (Garg et al., 2022, arXiv:2208.01066).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.models.block import MixerNames, MixerOptions, MLPName
from attnlab.models.inputs import Vectors
from attnlab.models.language_model import LanguageModel
from attnlab.nn.linear import Linear


class SequenceRegressor(LanguageModel):
    """Vectors `(B, N, token_features)` to predictions `(B, responses)` in float32.

    Args:
      token_features: numbers of a vector.
      responses: numbers of a prediction.
      features: channels C.
      depth: number of blocks.
      num_heads: heads of each mixer.
      mixer: name of a registered mixer with a causal form, or a pattern of names repeated over the depth.
      mixer_options: constructor options by mixer name.
      mlp: feed-forward of the blocks, or a pattern of them; see `LanguageModel`.
      mlp_ratio: hidden channels of the feed-forward over C.
      norm: `"rms"`, `"layer"` or `"srms"`.
      position: `"rotary"`, `"learned"` or `"none"`; see `LanguageModel`.
      max_length: longest sequence of a learned table; None without one.
      dropout: rate in front of the blocks and inside the feed-forward.
      drop_path: stochastic depth rate of the last block.
      remat: recompute blocks in the backward pass.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: for an unknown option, as `LanguageModel`.
      UnsupportedArgument: for a mixer without a causal form.
    """

    inputs: ClassVar[Vectors] = Vectors()

    def __init__(
        self,
        token_features: int,
        responses: int,
        *,
        features: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mixer: MixerNames = "softmax_attention",
        mixer_options: MixerOptions | None = None,
        mlp: MLPName | Sequence[MLPName] = "swiglu",
        mlp_ratio: float = 8 / 3,
        norm: Literal["rms", "layer", "srms"] = "rms",
        position: Literal["rotary", "learned", "none"] = "rotary",
        max_length: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            responses,
            features=features,
            depth=depth,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            mlp=mlp,
            mlp_ratio=mlp_ratio,
            norm=norm,
            position=position,
            max_length=max_length,
            embed_scale=1.0,
            tie_embeddings=False,
            dropout=dropout,
            drop_path=drop_path,
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        # Vectors come in by a map of their own.
        self.embedding = nnx.data(None)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.into = Linear(token_features, features, axes=(None, "embed"), **common)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None, deterministic: bool = True) -> jax.Array:
        """Predicts from vectors `(B, N, token_features)`; `mask` `(B, N)` is False at padding, in front."""
        rows = self.into(jnp.asarray(x, self.dtype))
        return super().__call__(embeddings=rows, mask=mask, deterministic=deterministic)[:, -1]
