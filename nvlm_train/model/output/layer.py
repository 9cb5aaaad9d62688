"""The vocabulary-parallel output layer: logits for generation, losses for training.

Shape legend: L positions that are wanted, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.model.output.token_losses import VocabularyShard, token_losses
from nvlm_train.parallel.topology import Topology


class OutputLayer(tensor_parallel.ColumnParallelLinear):
    """megatron-core's linear, which can also go on to the loss, without all logits at once.

    It reads gathered positions, so it must not gather a sequence. Rows of the vocabulary from
    `num_tokens` on are padding. Their rows of zeros would have logits of zero, which take part in the
    softmax and can be the largest: the loss would not be that of the model whose table was padded, and
    the rows would train. So their logits are minus infinity, probabilities and gradients exactly zero.

    Args:
        config: of the language model.
        language: its sizes.
        topology: this rank's place.
        skip_table: whether it has no table of its own, because the embedding's is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        topology: Topology,
        skip_table: bool,
    ) -> None:
        own = copy.copy(config)
        own.sequence_parallel = False
        super().__init__(
            config.hidden_size,
            language.vocab_size,
            config=own,
            init_method=torch.nn.init.zeros_,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=skip_table,
        )
        self.num_padding = num_padding(language, topology)
        rows = self.output_size_per_partition
        self.shard = VocabularyShard(
            first=topology.tensor_rank * rows,
            rows=rows - self.num_padding,
            group=self.tp_group,
            fuses_gradient=self.gradient_accumulation_fusion,
        )

    def forward(self, hidden_LBH: Tensor, weight: Tensor, labels_L: Tensor | None = None) -> Tensor:
        """Returns logits [L, 1, V / TP]; with labels their losses instead, fp32 [L].

        Losses are computed here and not in a function of their own, because what waits for a module's
        weights (megatron-core's `overlap_param_gather`) is a hook on its call.

        Args:
            hidden_LBH: normalised, whole on every tensor-parallel rank.
            weight: this rank's table.
            labels_L: int64, the id to predict at each position.
        """
        if labels_L is not None:
            return token_losses(hidden_LBH.squeeze(1), weight, labels_L, self.shard)
        logits: Tensor = super().forward(hidden_LBH, weight=weight)[0]
        if self.num_padding:
            tokens = logits[..., : logits.shape[-1] - self.num_padding]
            logits = F.pad(tokens, (0, self.num_padding), value=float("-inf"))
        return logits


def num_padding(language: LanguageConfig, topology: Topology) -> int:
    """Counts the rows of the vocabulary that are padding among this rank's, which it ends with."""
    if language.num_tokens is None:
        return 0
    own = language.vocab_size // topology.tensor_size
    end = (topology.tensor_rank + 1) * own
    return min(max(end - language.num_tokens, 0), own)
