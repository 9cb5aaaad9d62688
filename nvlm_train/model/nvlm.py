"""NVLM-D, X and H: tiles in the decoder's sequence, in a cross-attention context, or some in each.

Shape legend: S tokens of a pack, C tokens of its context, H hidden, L positions whose logits are
wanted, V vocabulary, n tokens of features.
"""

from __future__ import annotations

from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.device_batch import DevicePack
from nvlm_train.geometry import tile_feature_size
from nvlm_train.model import context_p2p
from nvlm_train.model.language import LanguageModel
from nvlm_train.model.projector import Projector
from nvlm_train.model.resampler import Resampler
from nvlm_train.parallel.kernels import Kernels
from nvlm_train.parallel.topology import Topology


class NVLM(MegatronModule):
    """One pipeline stage of the model. The first one holds the projector and the embedding."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        pack_length: int,
        topology: Topology,
        kernels: Kernels,
    ) -> None:
        super().__init__(config)
        self.pre_process = topology.is_first_pp_stage
        self.post_process = topology.is_last_pp_stage
        self.share_embeddings_and_output_weights = model.language.tied_embeddings
        self.model_type = ModelType.encoder_or_decoder
        if self.pre_process:
            self.projector = Projector(
                config, model.projector, tile_feature_size(model.vision), kernels
            )
            self.resampler = (
                Resampler(config, model.resampler, kernels) if model.resampler else None
            )
        self.language_model = LanguageModel(
            config, model.language, model.cross_attention, pack_length, topology, kernels
        )
        self._received: Tensor | None = None

    def forward(self, pack: DevicePack, features: Tensor | None, relayed: int) -> Tensor:
        """Runs one pack through this stage.

        Args:
            pack: the microbatch.
            features: [T, tokens per tile, feature size]; None past the first stage.
            relayed: rows of context that stages send with each pack of the round.

        Returns:
            Last stage: losses of the labels, fp32 [L]; without labels logits [L, 1, V / TP].
            Others: what the next stage needs (`context_p2p.join`).
        """
        embedded, states_CBH = None, None
        if features is not None:
            embedded, states_CBH = self._enter(pack, features)
        else:
            assert self._received is not None, "the schedule sets a later stage's input"
            received, self._received = self._received, None
            hidden_SBH, states_CBH = context_p2p.split(self.config, received, pack.context, relayed)
            self.language_model.set_input_tensor(hidden_SBH)
        hidden_SBH = self.language_model(embedded, pack, states_CBH)
        if self.post_process:
            if pack.labels is not None:
                return self.language_model.losses(hidden_SBH, pack.labels.ids_L)
            return self.language_model.logits(hidden_SBH, len(pack.wanted))
        return context_p2p.join(self.config, hidden_SBH, states_CBH, relayed)

    def _enter(self, pack: DevicePack, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splices decoder-routed features into the sequence, and builds the context of the others."""
        # A text-only pack runs the projector on no rows: its gradients are then zeros instead of
        # missing, which is what overlapped gradient reduction and a frozen language model need.
        projected = self.projector(features)
        if self.resampler is not None:
            projected = self.resampler(projected)
        text_SBH = self.language_model.embed(pack.token_ids_S)
        states_CBH, context = None, pack.context
        if context is not None:
            tiles = projected.index_select(0, context.cross_tiles)
            tags = self.language_model.embed(context.tag_ids)
            states_CBH = text_SBH.new_zeros(context.length, *text_SBH.shape[1:])
            states_CBH = states_CBH.index_copy(0, context.tile_positions, _rows(tiles))
            states_CBH = states_CBH.index_copy(0, context.tag_positions, tags)
            projected = projected.index_select(0, context.decoder_tiles)
        spliced = text_SBH.index_copy(0, pack.image_positions, _rows(projected))
        return self.language_model.scatter(spliced), states_CBH

    def shared_embedding_or_output_weight(self) -> nn.Parameter:
        """Returns the table whose two copies' gradients megatron-core sums, where tables are tied."""
        return self.language_model.table()

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Takes what the previous stage sent; the pipeline schedule calls it."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor


def _rows(features_TnH: Tensor) -> Tensor:
    """Returns the features of all tiles, one behind the other, [T n, 1, H]."""
    return features_TnH.reshape(-1, 1, features_TnH.shape[-1])
