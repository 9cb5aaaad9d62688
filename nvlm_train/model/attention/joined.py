"""megatron-core's self-attention with everything between its two projections in one function, on CPUs.

Shape legend: S tokens of a pack, L wanted rows, G local KV groups, R query heads of a group, D head size, X =
G (R + 2) D projected channels, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from nvlm_train.model.attention.segments import attend_joined
from nvlm_train.model.attention.wanted import attend_wanted
from nvlm_train.model.last_layer import SdpaOfWanted
from nvlm_train.model.layers import SdpaAttention
from nvlm_train.model.pack import Pack

JOINED: Mapping[type, Callable[[Tensor, Pack, float | None], Tensor]] = {
    SdpaAttention: attend_joined,
    SdpaOfWanted: attend_wanted,
}
"""Core attention to what does the same in one function, turns included."""


class JoinedSelfAttention(SelfAttention):
    """megatron-core's self-attention, which goes from one projection to the other in one function.

    It does so with the attentions of `JOINED` on a CPU. Dropout of attention weights, norms of queries and
    keys, and a core attention that is made again in backward take megatron-core's way.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Pack,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output [S, 1, H], the last layer's [L, 1, H], and the projection's bias."""
        if hidden_states.is_cuda or not self._is_plain(packed_seq_params):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, attention_mask, packed_seq_params=packed_seq_params, **others
            )
        mixed_SBX, _ = self.linear_qkv(hidden_states)
        heads_SGHD = mixed_SBX.view(
            len(mixed_SBX),
            self.num_query_groups_per_partition,
            -1,
            self.hidden_size_per_attention_head,
        )
        attend = JOINED[type(self.core_attention)]
        attended = attend(heads_SGHD, packed_seq_params, self.core_attention.scale)
        return self.linear_proj(attended)  # type: ignore[no-any-return]

    def _is_plain(self, pack: Pack) -> bool:
        return (
            type(self.core_attention) in JOINED
            and self.core_attention.dropout_now == 0
            and self.q_layernorm is None
            and self.k_layernorm is None
            and pack.turns is not None
            and self.config.num_query_groups >= self.world_size
            and not (self.checkpoint_core_attention and self.training)
        )
