"""The language model of one pipeline stage, on megatron-core's embedding, block and output layer.

Shape legend: S tokens of a pack, B batch (always 1), H hidden, L positions whose logits are wanted,
V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from nvlm_train.config.model_schema import CrossAttentionConfig, LanguageConfig
from nvlm_train.device_batch import DevicePack
from nvlm_train.model.attention.choice import choose_cores
from nvlm_train.model.attention.rope import Turns, angles, rotary_embedding
from nvlm_train.model.block import decoder_block_spec
from nvlm_train.model.output.layer import OutputLayer
from nvlm_train.model.pack import pack_for_layers
from nvlm_train.parallel.kernels import Kernels
from nvlm_train.parallel.topology import Topology

logger = logging.getLogger(__name__)


class LanguageModel(MegatronModule):
    """The first pipeline stage has the embedding, every stage has layers, the last has the output layer.

    Parameter names are those of megatron-core's GPTModel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        cross: CrossAttentionConfig | None,
        pack_length: int,
        topology: Topology,
        kernels: Kernels,
    ) -> None:
        super().__init__(config)
        self.kernels = kernels
        self.cores = choose_cores(config, kernels)
        if self.cores.reason is not None and torch.cuda.is_available():
            logger.warning("attention in one call a segment and a span: %s", self.cores.reason)
        if topology.is_first_pp_stage:
            self.embedding = LanguageModelEmbedding(
                config,
                language.vocab_size,
                pack_length,
                position_embedding_type="none",
                # Image features are spliced in first; the sequence is scattered after that.
                scatter_to_sequence_parallel=False,
            )
        self.rotary = rotary_embedding(language)
        self.decoder = TransformerBlock(
            config,
            decoder_block_spec(config, cross, kernels),
            pre_process=topology.is_first_pp_stage,
            post_process=topology.is_last_pp_stage,
        )
        is_tied_here = language.tied_embeddings and topology.is_first_pp_stage
        if topology.is_last_pp_stage:
            self.output_layer = OutputLayer(config, language, topology, is_tied_here)
        self.is_copy_of_embedding = (
            language.tied_embeddings
            and topology.is_last_pp_stage
            and not topology.is_first_pp_stage
        )
        if language.tied_embeddings:
            self._mark_shared_table(topology)

    def embed(self, token_ids_S: Tensor) -> Tensor:
        """Looks words up: [S, 1, H], whole and the same on every tensor-parallel rank.

        Dropout comes before features are spliced in and before a sequence is scattered: it is for words,
        in the sequence or in a context, and never for projected features (as in megatron-core's LLaVA,
        models/multimodal/llava_model.py).
        Here all ranks hold all words, so the default generator's mask is one mask. That of megatron-core's
        own embedding differs between them under sequence parallelism; the scatter would then keep, of each
        rank's words, a part whose gradient the other ranks mask in another way.
        """
        words_SBH = self.embedding.word_embeddings(token_ids_S[:, None])
        return F.dropout(words_SBH, self.config.hidden_dropout, self.training)

    def scatter(self, hidden_SBH: Tensor) -> Tensor:
        """Returns this rank's part of the sequence under sequence parallelism, and all of it otherwise."""
        if not self.config.sequence_parallel:
            return hidden_SBH
        return tensor_parallel.scatter_to_sequence_parallel_region(hidden_SBH).clone()

    def forward(
        self, hidden_SBH: Tensor | None, pack: DevicePack, context_CBH: Tensor | None = None
    ) -> Tensor:
        """Runs this stage's layers.

        Args:
            hidden_SBH: embeddings on the first stage; None elsewhere (the schedule set the input).
            pack: the microbatch.
            context_CBH: what cross-attention reads, whole on every tensor-parallel rank.

        Returns:
            [S, 1, H]; on the last stage [L, 1, H], normalised. Under sequence parallelism this
            rank's part of it, with rows at the end that fill L up to a multiple of TP.
        """
        turning = angles(self.rotary, pack, self.kernels)
        is_engine, turns = self.cores.tokens == "transformer_engine", None
        if not is_engine:
            turns = Turns.of(turning, self.config.params_dtype)
        return self.decoder(
            hidden_SBH,
            None,
            context=context_CBH,
            rotary_pos_emb=turning if is_engine else None,
            packed_seq_params=pack_for_layers(self.config, pack, self.cores, turns),
        )

    def logits(self, hidden_LBH: Tensor, length: int) -> Tensor:
        """Computes logits of the last layer's first `length` rows, [L, 1, V / TP] (`OutputLayer`)."""
        # Where the table is the embedding's, the output layer has none of its own.
        logits: Tensor = self.output_layer(self._whole(hidden_LBH, length), self.table())
        return logits

    def losses(self, hidden_LBH: Tensor, labels_L: Tensor) -> Tensor:
        """Computes cross-entropies of the last layer's first L rows, fp32 [L], the same on all TP ranks."""
        whole_LBH = self._whole(hidden_LBH, len(labels_L))
        losses_L: Tensor = self.output_layer(whole_LBH, self.table(), labels_L)
        return losses_L

    def _whole(self, hidden_LBH: Tensor, length: int) -> Tensor:
        """Gathers the last layer's rows where sequence parallelism has cut and filled them up."""
        if not self.config.sequence_parallel:
            return hidden_LBH
        # The output layer's backward already sums over tensor-parallel ranks; the gather must not again.
        whole_LBH: Tensor = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_LBH, tensor_parallel_output_grad=False
        )
        return whole_LBH[:length]

    def table(self) -> nn.Parameter:
        """Returns this stage's table with a row for each id: the output layer's, else the embedding's.

        Tied embeddings have a copy on both ends of the pipeline; megatron-core sums the gradients of the
        two (`finalize_model_grads`), so that equal copies stay equal.
        """
        own: nn.Parameter | None = (
            self.output_layer.weight if hasattr(self, "output_layer") else None
        )
        return self.embedding.word_embeddings.weight if own is None else own

    def _mark_shared_table(self, topology: Topology) -> None:
        """Tells megatron-core which copy counts in the gradient norm, and which buckets hold copies.

        The marks are those of its LanguageModule (`setup_embeddings_and_output_layer`).
        """
        if topology.is_first_pp_stage and topology.is_last_pp_stage:
            self.table().zero_out_wgrad = True  # type: ignore[attr-defined]
        elif topology.is_first_pp_stage or topology.is_last_pp_stage:
            self.table().shared_embedding = True  # type: ignore[attr-defined]
            self.table().shared = self.is_copy_of_embedding  # type: ignore[attr-defined]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Describes this stage's slices; the last stage's copy of a tied table is one of the embedding's."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.is_copy_of_embedding:
            entry = state[f"{prefix}output_layer.weight"]
            entry.key = f"{prefix}embedding.word_embeddings.weight"
            entry.replica_id = (1, *entry.replica_id[1:])
        return state

    def set_input_tensor(self, hidden_SBH: Tensor) -> None:
        """Takes what the previous stage sent; the pipeline schedule calls it."""
        self.decoder.set_input_tensor(hidden_SBH)
