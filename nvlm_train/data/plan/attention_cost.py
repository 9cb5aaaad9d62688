"""What attention computes for a sample, from the two numbers that a plan has of it."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_train.batch import PackPlan
from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.geometry import context_tokens_per_tile, num_cross_layers
from nvlm_train.routes import ROUTES


@dataclass(frozen=True)
class AttentionCost:
    """Attention's part of `costs.step_flops`, in units that differ between models: 2 x width of the queries.

    All else that is computed for a token is the same wherever the token stands. Only attention asks how
    long the sample is around it, and how many tiles the sample sees.
    """

    per_pair: int = 1
    """Of a sample's length squared: causal self-attention, in all layers."""
    per_tile_and_token: int = 0
    """Of a token and a tile whose features it sees: cross-attention, in the layers that have it."""
    tiles_in_decoder: int = 0
    """So many tiles of a sample are not cross-routed: NVLM-H's thumbnail."""

    def of_sample(self, num_tokens: int, num_tiles: int) -> int:
        """Counts a sample as if all its tokens saw all its tiles, and as if it had one image.

        >>> AttentionCost(2, 10, tiles_in_decoder=1).of_sample(num_tokens=5, num_tiles=3)
        150
        """
        crossing = max(0, num_tiles - self.tiles_in_decoder)
        return self.per_pair * num_tokens**2 + self.per_tile_and_token * num_tokens * crossing

    def of_pack(self, pack: PackPlan) -> int:
        """Adds up the pack's samples: they do not see each other."""
        return sum(self.of_sample(each.num_tokens, each.num_tiles) for each in pack.samples)


SELF_ATTENTION = AttentionCost()
"""Squares of lengths alone: of a model that nobody knows."""


def attention_cost(model: ModelConfig) -> AttentionCost:
    """Returns what attention costs in a model."""
    routes = ROUTES[model.architecture]
    return AttentionCost(
        # Causal: half of the pairs, for queries times keys and for weights times values.
        per_pair=model.language.num_layers,
        per_tile_and_token=2 * num_cross_layers(model) * context_tokens_per_tile(model),
        tiles_in_decoder=int(routes.thumbnail == "decoder"),
    )
