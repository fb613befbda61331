import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paged_attn_layer._src.blocks.embedding import embedding_rows


def test_rows_have_the_type_that_the_weights_have_now():
    graph, weights = nnx.split(nnx.Embed(5, 4, rngs=nnx.Rngs(0)))
    embed = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights))
    rows = embedding_rows(embed, jnp.array([[3, 0]], jnp.int32))
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows[0, 0], embed.embedding[...][3])
