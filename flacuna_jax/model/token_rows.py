"""Trained rows of the tables of the vocabulary: float32 rows that replace those of some tokens.

They are a part of an adapter, like PEFT's `trainable_token_indices`. Only these rows have a gradient: no gradient has
the size of a table. Rows and table are selected element by element, so a table stays split over the devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flacuna_jax.model.variables import LoRAParam, ModuleName, ParamInfo

PEFT_LEAF = "token_adapter.trainable_tokens_delta"
"""PEFT's name, although the tensor has the rows themselves."""


@dataclasses.dataclass(frozen=True)
class TrainedTokens:
    """The ids of the tokens whose rows are trained, in the order of the rows."""

    embedding: tuple[int, ...] = ()
    head: tuple[int, ...] = ()
    """Of a head that is not tied to the embedding; a tied head uses the rows of the embedding."""

    def __str__(self) -> str:
        return f"the tokens {list(self.embedding)} of the embedding and {list(self.head)} of the head"

    @classmethod
    def everywhere(cls, ids: tuple[int, ...], tied: bool) -> "TrainedTokens":
        """The same tokens in the embedding and in the head."""
        return cls(ids, () if tied else ids)


NO_TOKENS = TrainedTokens()


class TokenRows(nnx.Module):
    """Rows [tokens, model] that replace those of a table [vocab, model].

    Args:
      name: the module of the table.
      table_vd: the table, whose rows are the initial values.
      ids: the token of each row.
    """

    def __init__(self, name: ModuleName, table_vd: jax.Array, ids: tuple[int, ...]) -> None:
        self.ids, self.vocab_size = ids, table_vd.shape[0]
        rows_nd = table_vd[np.array(ids)].astype(jnp.float32)
        self.rows = LoRAParam(rows_nd, info=ParamInfo(name, PEFT_LEAF, "token_rows", (None, None)))

    def in_lookup(self, x_btd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
        """Embeddings of tokens, with those of the trained tokens replaced."""
        index_bt = jnp.asarray(self._row_of_token)[tokens_bt]
        rows_btd = self.rows[...][jnp.maximum(index_bt, 0)].astype(x_btd.dtype)
        return jnp.where(index_bt[..., None] >= 0, rows_btd, x_btd)

    def in_table(self, table_vd: jax.Array) -> jax.Array:
        """The table with the rows of the trained tokens replaced."""
        index_v = self._row_of_token
        rows_vd = self.rows[...].astype(table_vd.dtype)[np.maximum(index_v, 0)]
        return jnp.where(index_v[:, None] >= 0, rows_vd, table_vd)

    def in_logits(self, logits_btv: jax.Array, hidden_btd: jax.Array) -> jax.Array:
        """Logits of the table without these rows, with those of the trained tokens replaced. Decoding uses this,
        because `in_table` would copy the table for every token."""
        index_v, rows_nd = self._row_of_token, self.rows[...].astype(hidden_btd.dtype)
        of_rows_btn = jnp.einsum("btd,nd->btn", hidden_btd, rows_nd, preferred_element_type=jnp.float32)
        return jnp.where(index_v >= 0, of_rows_btn[..., np.maximum(index_v, 0)], logits_btv)

    @property
    def _row_of_token(self) -> np.ndarray:
        return _row_of_token(self.ids, self.vocab_size)


@functools.lru_cache(maxsize=8)
def _row_of_token(ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """int32 [vocab]: the row of each token, -1 for tokens that are not trained."""
    found = np.full(vocab_size, -1, np.int32)
    found[np.array(ids)] = np.arange(len(ids))
    return found
