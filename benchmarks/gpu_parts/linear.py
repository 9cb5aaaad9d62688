"""Products of a linear, its weight gradient into an fp32 buffer, the loss, and the optimizer.

Shape legend: S tokens of a pack, L trained tokens, H hidden, I and O channels in and out, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.shapes import LANGUAGES, Sizes
from benchmarks.gpu_parts.variants import Row, Run, Timing, Variant, compare, random
from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.model.output.token_losses import VocabularyShard, token_losses
from nvlm_train.parallel.adam import GroupStepAdamW
from nvlm_train.parallel.topology import device
from nvlm_train.parallel.weight_gradient import WeightGradient

CHUNKS = (256, 512, 1024)
"""Rows of logits at a time."""


def linears(language: LanguageConfig) -> dict[str, tuple[int, int]]:
    """(channels in, channels out) of a decoder layer's linears."""
    hidden, ffn = language.hidden_size, language.ffn_hidden_size
    groups = hidden // language.num_heads * language.num_kv_heads
    return {
        "qkv": (hidden, hidden + 2 * groups),
        "proj": (hidden, hidden),
        "fc1": (hidden, 2 * ffn),
        "fc2": (ffn, hidden),
    }


# ---- products ----


def product_rows(sizes: Sizes, timing: Timing) -> list[Row]:
    """Forward, input gradient and weight gradient of each linear, bf16, at a pack's rows: the floor."""
    rows = []
    for name, (channels_in, channels_out) in linears(LANGUAGES[sizes.language]).items():
        inputs = random(sizes.pack_length, channels_in).detach()
        weight = random(channels_out, channels_in, scale=0.02).detach()
        gradient = random(sizes.pack_length, channels_out).detach()

        def products(
            inputs: Tensor = inputs, weight: Tensor = weight, gradient: Tensor = gradient
        ) -> tuple[Tensor, ...]:
            return inputs @ weight.t(), gradient @ weight, gradient.t() @ inputs

        found = compare("products", None, [Variant(name, lambda run=products: run)], timing)  # type: ignore[misc]
        flops = 6.0 * sizes.pack_length * channels_in * channels_out
        rows += [row | _rate(flops, row) for row in found]
    return rows


def _rate(flops: float, row: Row) -> Row:
    return {"tflop_per_s": round(flops / row["ms"] / 1e9, 1)} if "ms" in row else {}


# ---- weight gradients ----


def weight_gradient_rows(sizes: Sizes, timing: Timing) -> list[Row]:
    """A layer's linears and the output layer: gradient^T x input added to an fp32 buffer."""
    language = LANGUAGES[sizes.language]
    shapes = {name: (sizes.pack_length, *shape) for name, shape in linears(language).items()}
    shapes["output_layer"] = (
        sizes.pack_length // 4, language.hidden_size, language.vocab_size,
    )  # fmt: skip
    rows = []
    for name, (tokens, channels_in, channels_out) in shapes.items():
        inputs = random(tokens, channels_in).detach()
        gradient = random(tokens, channels_out).detach()
        buffer = torch.zeros(channels_out, channels_in, device=device())

        def run(
            add: Callable[..., object],
            inputs: Tensor = inputs,
            gradient: Tensor = gradient,
            buffer: Tensor = buffer,
        ) -> Run:
            def once() -> tuple[Tensor, ...]:
                # From zero each time, so that it can be compared; the same cost for all.
                buffer.zero_()
                add(buffer, gradient, inputs)
                return (buffer,)

            return once

        expected = gradient.t().float() @ inputs.float()
        found = compare(
            f"weight_gradient_{name}",
            lambda expected=expected: (expected,),  # type: ignore[misc]
            [
                Variant("separate", partial(run, add_separately)),
                Variant("addmm_fp32", partial(run, add_by_addmm), needs_cuda=True),
                Variant("transformer_engine", partial(run, add_by_engine), needs_cuda=True),
            ],
            timing,
        )
        rows += found
    return rows


def add_separately(buffer_OI: Tensor, gradient_SO: Tensor, inputs_SI: Tensor) -> None:
    """A bf16 product, then an addition that reads it and the buffer."""
    buffer_OI.add_(gradient_SO.t() @ inputs_SI)


def add_by_addmm(buffer_OI: Tensor, gradient_SO: Tensor, inputs_SI: Tensor) -> None:
    """As training does it without apex: bf16 operands, fp32 sum, written where it stands."""
    WeightGradient.wgrad_gemm_accum_fp32(inputs_SI, gradient_SO, buffer_OI)


def add_by_engine(buffer_OI: Tensor, gradient_SO: Tensor, inputs_SI: Tensor) -> None:
    """What Transformer Engine's linear does with `fuse_wgrad_accumulation`."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        inputs_SI,
        gradient_SO,
        out_dtype=torch.float32,
        layout="NT",
        out=buffer_OI,
        accumulate=True,
        use_split_accumulator=True,
    )


# ---- loss ----


def loss_rows(sizes: Sizes, timing: Timing) -> list[Row]:
    """Hidden states of trained tokens to losses, their gradient, and the output layer's in fp32."""
    language = LANGUAGES[sizes.language]
    trained = sizes.pack_length // 4
    hidden = random(trained, language.hidden_size)
    weight = random(language.vocab_size, language.hidden_size, scale=0.02)
    labels = torch.randint(0, language.vocab_size, (trained,), device=device())
    buffer = torch.zeros(weight.shape, device=device())
    problem = (hidden, weight, labels, buffer)

    def reference() -> tuple[Tensor, ...]:
        states, table = (each.detach().float().requires_grad_() for each in (hidden, weight))
        losses = F.cross_entropy(states @ table.t(), labels, reduction="none")
        gradients = torch.autograd.grad(losses.sum() / trained, (states, table))
        return losses, *gradients

    by_megatron = {
        "plain": lambda logits: vocab_parallel_cross_entropy(
            logits.float()[:, None], labels[:, None]
        ),
        "megatron_fused": lambda logits: fused_vocab_parallel_cross_entropy(
            logits[:, None], labels[:, None], get_tensor_model_parallel_group()
        ),
    }
    variants = [
        Variant(name, lambda function=function: _whole(problem, function))  # type: ignore[misc]
        for name, function in by_megatron.items()
    ]
    variants.append(Variant("vocabulary_chunks", partial(_as_trained, problem)))
    variants += [
        Variant(f"chunks_of_{rows}", partial(_chunked, problem, rows, add_separately))
        for rows in CHUNKS
    ]
    variants += [
        Variant(
            f"chunks_of_{rows}_addmm",
            partial(_chunked, problem, rows, add_by_addmm),
            needs_cuda=True,
        )
        for rows in CHUNKS
    ]
    variants += [
        Variant(
            f"chunks_of_{rows}_addmm_compiled",
            partial(_chunked, problem, rows, add_by_addmm, turn_compiled),
            needs_cuda=True,
        )
        for rows in CHUNKS
    ]
    return compare("loss", reference, variants, timing)


Problem = tuple[Tensor, Tensor, Tensor, Tensor]
"""Hidden states [L, H], table [V, H], labels [L], fp32 buffer [V, H]."""


def _whole(problem: Problem, losses_of: Callable[[Tensor], Tensor]) -> Run:
    """All logits at once; the table's gradient is a bf16 product, added to the buffer."""
    hidden, weight, _, buffer = problem

    def run() -> tuple[Tensor, ...]:
        losses = losses_of(hidden @ weight.t())[:, 0]
        of_hidden, of_weight = torch.autograd.grad(losses.sum() / len(hidden), (hidden, weight))
        buffer.zero_().add_(of_weight)
        return losses, of_hidden, buffer

    return run


def _as_trained(problem: Problem) -> Run:
    """As training does it: chunks of the vocabulary, compiled on CUDA, gradient into the buffer."""
    hidden, weight, labels, buffer = problem
    weight.main_grad = buffer  # type: ignore[attr-defined]
    shard = VocabularyShard(0, len(weight), get_tensor_model_parallel_group(), fuses_gradient=True)

    def run() -> tuple[Tensor, ...]:
        buffer.zero_()
        losses = token_losses(hidden, weight, labels, shard)
        of_hidden, _ = torch.autograd.grad(
            losses.sum() / len(hidden), (hidden, weight), allow_unused=True
        )
        return losses.detach(), of_hidden, buffer

    return run


def _chunked(
    problem: Problem,
    rows: int,
    add: Callable[..., object],
    turn_made: Callable[[], Turn] = lambda: turn_logits,
) -> Run:
    """Logits of `rows` tokens at a time; gradients are formed with them, in the forward pass."""
    hidden, weight, labels, buffer = problem
    turn = turn_made()

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        buffer.zero_()
        losses, of_hidden = [], torch.empty_like(hidden)
        pieces = zip(hidden.split(rows), labels.split(rows), of_hidden.split(rows), strict=True)
        for states, wanted, of_states in pieces:
            loss, of_logits = turn(states @ weight.t(), wanted, 1.0 / len(hidden))
            losses.append(loss)
            torch.mm(of_logits, weight, out=of_states)
            add(buffer, of_logits, states)
        return torch.cat(losses), of_hidden, buffer

    return run


Turn = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def turn_compiled() -> Turn:
    """`turn_logits`, compiled for one number of rows."""
    return torch.compile(turn_logits, dynamic=False)


def turn_logits(logits_LV: Tensor, labels_L: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cross-entropies in fp32, and `scale` times their gradient in the logits' dtype."""
    values = logits_LV.float()
    normaliser = values.logsumexp(dim=-1, keepdim=True)
    losses = normaliser[:, 0] - values.gather(1, labels_L[:, None])[:, 0]
    gradient = (values - normaliser).exp()
    gradient = gradient.scatter_add(1, labels_L[:, None], torch.full_like(normaliser, -1.0))
    return losses, (gradient * scale).to(logits_LV.dtype)


# ---- optimizer ----


def optimizer_rows(parameters: int, timing: Timing) -> list[Row]:
    """AdamW on one flat fp32 tensor, as the distributed optimizer holds its shard; per billion."""

    def flat() -> Tensor:
        weights = torch.zeros(parameters, device=device(), requires_grad=True)
        weights.grad = torch.full_like(weights, 1e-3)
        return weights

    def stepping(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Run:
        optimizer = make([flat()])

        def run() -> tuple[Tensor, ...]:
            optimizer.step()
            return ()

        return run

    def engine(values: list[Tensor]) -> torch.optim.Optimizer:
        from transformer_engine.pytorch.optimizers import FusedAdam

        return FusedAdam(values, lr=1e-4, weight_decay=0.1)

    def copying() -> Run:
        weights = flat().detach()
        low = torch.empty_like(weights, dtype=torch.bfloat16)

        def run() -> tuple[Tensor, ...]:
            low.copy_(weights)
            return ()

        return run

    rows = compare(
        "optimizer",
        None,
        [
            Variant("torch_fused", lambda: stepping(partial(GroupStepAdamW, lr=1e-4))),
            Variant("transformer_engine", lambda: stepping(engine), needs_cuda=True),
            Variant("copy_to_bf16", copying),
        ],
        timing,
    )
    billions = parameters / 1e9
    return [
        row | {"ms_per_billion": round(row["ms"] / billions, 2)} if "ms" in row else row
        for row in rows
    ]
