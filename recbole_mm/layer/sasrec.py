r"""Self-attentive sequence encoder of SASRec, in the variant that PerPEFT builds on.

Sources: SASRec ("Self-Attentive Sequential Recommendation", ICDM 2018) and PerPEFT (WWW 2026, https://github.com/kswoo97/PerPEFT).
Item vectors come from outside, because in PerPEFT they depend on the user's group. What differs from RecBole's SASRec: sequences are padded
on the left, positions are absolute columns (1..T, padding has none), inputs are scaled by sqrt(D), only the queries are normalised before
attention, and padded positions are attended to unless `mask_padding` is set (parity with the reference).

Shapes: B batch, T length, D width.
"""

import torch
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Multi-head attention of normalised queries [B, T, D] over raw keys and values [B, T, D], each position seeing itself and the past."""

    def __init__(self, dim: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.project = nn.Linear(dim, 3 * dim)  # query, key and value in one matrix, so that Xavier's bound is the reference's
        self.out = nn.Linear(dim, dim)
        self.dropout = dropout
        nn.init.zeros_(self.project.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, query: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Attend under a Boolean `mask` ([T, T] or [B, 1, T, T], true = visible)."""

        def heads(z: Tensor) -> Tensor:
            return z.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

        dim = x.shape[-1]
        weight, bias = self.project.weight, self.project.bias
        q = nn.functional.linear(query, weight[:dim], bias[:dim])
        k, v = nn.functional.linear(x, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        dropout = self.dropout if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    r"""q = LN(x), x = q + Attention(q, x, x); y = LN(x), output y + W_2 ReLU(W_1 y)."""

    def __init__(self, dim: int, n_heads: int, attention_dropout: float, hidden_dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-8)
        self.attention = CausalAttention(dim, n_heads, attention_dropout)
        self.feed_norm = nn.LayerNorm(dim, eps=1e-8)
        self.inner = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(hidden_dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query = self.attention_norm(x)
        y = self.feed_norm(query + self.attention(query, x, mask))
        return y + self.dropout(self.outer(self.dropout(self.inner(y)).relu()))


class SequenceEncoder(nn.Module):
    """Item vectors of left-padded sequences [B, T, D] and where they are padding [B, T] -> one state per position [B, T, D]."""

    def __init__(
        self,
        max_length: int,
        dim: int,
        n_layers: int,
        n_heads: int,
        hidden_dropout: float,
        attention_dropout: float,
        mask_padding: bool = False,
    ):
        super().__init__()
        self.scale = dim**0.5
        self.mask_padding = mask_padding
        self.position_embedding = nn.Embedding(max_length + 1, dim, padding_idx=0)
        self.dropout = nn.Dropout(hidden_dropout)
        self.blocks = nn.ModuleList(Block(dim, n_heads, attention_dropout, hidden_dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim, eps=1e-8)
        self.register_buffer("causal", torch.ones(max_length, max_length, dtype=torch.bool).tril(), persistent=False)

    def embed(self, items: Tensor, padding: Tensor) -> Tensor:
        """Scaled item vectors plus positions, the input of the first block."""
        column = torch.arange(1, items.shape[1] + 1, device=items.device)
        return items * self.scale + self.position_embedding(column * ~padding)

    def forward(self, items: Tensor, padding: Tensor) -> Tensor:
        length = items.shape[1]
        mask = self.causal[:length, :length]
        if self.mask_padding:  # the diagonal stays visible: a row without any key would be NaN
            mask = (mask & ~padding[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=items.device)
        x = self.dropout(self.embed(items, padding))
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def xavier_normal_matrices(module: nn.Module) -> None:
    """Draw every matrix of `module` from Xavier's normal distribution; padding rows of embeddings become zero again."""
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            nn.init.xavier_normal_(parameter)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.Embedding) and child.padding_idx is not None:
                child.weight[child.padding_idx].zero_()
