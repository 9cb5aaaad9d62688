"""Full attention of encoders: queries, keys and values are one matrix product.

Shape legend: T tiles, P tokens of a tile, H hidden, N heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F


class QueryKeyValue(nn.Linear):
    """Projects to queries, keys and values at once: three matrices [H, H] below each other."""

    def __init__(self, hidden: int, bias: bool) -> None:
        super().__init__(hidden, 3 * hidden, bias=bias)

    def apart(self) -> Iterator[Tensor]:
        """Yields views of the weight and the bias, if there is one, of queries, then keys, then values."""
        weights = self.weight.chunk(3)
        biases = ((),) * 3 if self.bias is None else ((each,) for each in self.bias.chunk(3))
        for weight, bias in zip(weights, biases, strict=True):
            yield from (weight, *bias)


def attend_fused(qkv_TPW: Tensor, num_heads: int) -> Tensor:
    """Computes attention.

    Args:
        qkv_TPW: [T, P, 3 H], what `QueryKeyValue` returns.
        num_heads: heads; each has H / N channels that follow each other.

    Returns:
        [T, P, H].
    """
    parts_TP3ND = qkv_TPW.unflatten(-1, (3, num_heads, -1))
    return _attend(*parts_TP3ND.permute(2, 0, 3, 1, 4).unbind())


def attend(query_TPH: Tensor, key_TPH: Tensor, value_TPH: Tensor, num_heads: int) -> Tensor:
    """Computes attention of queries, keys and values [T, P, H] that are apart; see `attend_fused`."""
    query, key, value = (
        states.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for states in (query_TPH, key_TPH, value_TPH)
    )
    return _attend(query, key, value)


def _attend(query_TNPD: Tensor, key_TNPD: Tensor, value_TNPD: Tensor) -> Tensor:
    attended_TNPD = F.scaled_dot_product_attention(query_TNPD, key_TNPD, value_TNPD)
    return attended_TNPD.transpose(1, 2).flatten(2)
