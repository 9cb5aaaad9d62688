"""NVLM-D: tiles, thumbnail and text in one decoder sequence (NVLM 1.0, section 4.2).

Shape legend: S tokens of a pack, H hidden, L positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvlm_train.config.schema import ModelConfig
from nvlm_train.geometry import tile_feature_size
from nvlm_train.model.language import LanguageModel
from nvlm_train.model.projector import Projector
from nvlm_train.parallel.kernels import Kernels
from nvlm_train.parallel.topology import Topology


class NVLM(MegatronModule):
    """One pipeline stage of the model. The projector lives on the first one, with the embedding."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        sequence_length: int,
        topology: Topology,
        kernels: Kernels,
    ) -> None:
        super().__init__(config)
        self.pre_process = topology.is_first_pp_stage
        self.post_process = topology.is_last_pp_stage
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        if self.pre_process:
            self.projector = Projector(
                config, model.projector, tile_feature_size(model.vision), kernels
            )
        self.language_model = LanguageModel(
            config, model.language, sequence_length, topology, kernels
        )

    def forward(
        self,
        token_ids_S: Tensor,
        image_positions: Tensor,
        features: Tensor | None,
        cu_seqlens: Tensor,
        logit_positions_L: Tensor,
    ) -> Tensor:
        """Runs one pack through this stage.

        Args:
            token_ids_S: int64 [S].
            image_positions: int64 [n]: where the features go, in tile order.
            features: [T, tokens per tile, feature size] with n tokens in all; None past the first stage.
            cu_seqlens: int32 [segments + 1].
            logit_positions_L: int64 [L].

        Returns:
            Last stage: logits [L, 1, V / TP]. Others: hidden states for the next stage.
        """
        embedded = None
        if features is not None:
            embedded = self._splice(token_ids_S, image_positions, features)
        hidden_SBH = self.language_model(embedded, cu_seqlens)
        if self.post_process:
            return self.language_model.logits(hidden_SBH, logit_positions_L)
        return hidden_SBH

    def _splice(self, token_ids_S: Tensor, image_positions: Tensor, features: Tensor) -> Tensor:
        # A text-only pack runs the projector on no rows: its gradients are then zeros instead of
        # missing, which is what overlapped gradient reduction and a frozen language model need.
        projected = self.projector(features.flatten(0, 1))
        text_SBH = self.language_model.embed(token_ids_S)
        spliced = text_SBH.index_copy(0, image_positions, projected.unsqueeze(1))
        return self.language_model.scatter(spliced)

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Called by the pipeline schedule with what the previous stage sent."""
        hidden = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.language_model.set_input_tensor(hidden)
