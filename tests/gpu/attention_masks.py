"""Runs on the workers: what dropout does inside an attention kernel, whose masks nobody sees.

Shape legend: S tokens of a pack, R rows of the output, N heads, G KV groups, D channels of a head, W all
channels of all heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.gpu import gradient_runs
from tests.gpu.paths import Path
from tests.parity import gradients


class Masks(NamedTuple):
    """Says of the weights that attention dropout left in a forward pass what a probability asks of them."""

    mean: float
    """Of the sums of each token's weights: 1."""
    variance: float
    """Of these sums, times the weights in each: p / (1 - p), if the kept ones are divided by 1 - p."""
    equal_heads: float
    """Share of sums that two heads have in common, where there are many weights in each."""


def rates_of(name: str, path: Path, rate: float) -> Masks:
    """Looks at the attention of all layers but the last.

    Queries and keys are zeros and values ones, so each output is the mean of what the mask left.
    """
    sums: list[Tensor] = []
    weights: list[Tensor] = []
    with path.chosen():
        engine = gradient_runs.start_with_attention_dropout(name, path, rate)
        batch = gradient_runs.batches(name, engine.topology.share)[0]
        layers = _attentions(engine.model.module)[:-1]
        with _with_zeros(layers, sums):
            gradients.of_batch(engine, batch)
    for pack in batch.rounds[0].microbatches:
        lengths = pack.cu_seqlens.diff().tolist()
        seen_S = torch.cat([torch.arange(1, length + 1) for length in lengths])
        # The packs run one after the other, and each through all layers.
        weights += [seen_S] * len(layers)
    sums_RN, seen_R = torch.cat(sums), torch.cat(weights)
    assert len(sums_RN) == len(seen_R)
    many = sums_RN[seen_R > 30]
    return Masks(
        mean=sums_RN.mean().item(),
        variance=((sums_RN - 1).square() * seen_R[:, None]).mean().item(),
        equal_heads=(many[:, 0] == many[:, 1]).float().mean().item(),
    )


def disagreements(name: str, path: Path, rate: float) -> list[float]:
    """Returns by attention and KV group how far its backward is from having the masks of its forward.

    Attention is linear in its values, so under one mask the gradient of the values times the values is the
    gradient of the output times the output, whatever the gradients are. The difference is relative to
    what the elements of the second product make as independent numbers: rounding leaves little of it,
    and two masks that have nothing in common about 1.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    with path.chosen():
        engine = gradient_runs.start_with_attention_dropout(name, path, rate)
        batch = gradient_runs.batches(name, engine.topology.share)[0]
        with _with_gradients_kept(_attentions(engine.model.module), seen):
            gradients.of_batch(engine, batch)
    found: list[float] = []
    for value_SGD, output_RW in seen:
        assert value_SGD.grad is not None and output_RW.grad is not None
        by_value_G = (value_SGD.grad.double() * value_SGD.double()).sum(dim=(0, 2))
        # The query heads of a group follow each other; H is all their channels.
        product_RGH = (output_RW.grad.double() * output_RW.double()).reshape(
            len(output_RW), value_SGD.shape[1], -1
        )
        scale_G = product_RGH.square().sum(dim=(0, 2)).sqrt()
        error_G = (product_RGH.sum(dim=(0, 2)) - by_value_G).abs() / scale_G.clamp(min=1e-30)
        found += error_G[scale_G > 0].tolist()
    return found


def disagreements_with_bug(bug: str, name: str, path: Path, rate: float) -> list[float]:
    """Returns `disagreements` while one of `gradient_runs.BUGS` is in place."""
    with gradient_runs.BUGS[bug]():
        return disagreements(name, path, rate)


def _attentions(model: Any) -> list[nn.Module]:
    return [layer.self_attention.core_attention for layer in model.language_model.decoder.layers]


@contextlib.contextmanager
def _with_zeros(attentions: list[nn.Module], sums: list[Tensor]) -> Iterator[None]:
    def zeros(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, *rest = arguments
        return (query * 0, key * 0, value * 0 + 1, *rest)

    def read(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        value_SGD = arguments[2]
        heads = output.reshape(len(output), -1, value_SGD.shape[-1])
        sums.append(heads[..., 0].detach().float().cpu())

    with contextlib.ExitStack() as stack:
        for attention in attentions:
            stack.callback(attention.register_forward_pre_hook(zeros).remove)
            stack.callback(attention.register_forward_hook(read).remove)
        yield


@contextlib.contextmanager
def _with_gradients_kept(
    attentions: list[nn.Module], seen: list[tuple[Tensor, Tensor]]
) -> Iterator[None]:
    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        value = arguments[2]
        for tensor in (value, output):
            tensor.retain_grad()
        seen.append((value, output))

    with contextlib.ExitStack() as stack:
        for attention in attentions:
            stack.callback(attention.register_forward_hook(keep).remove)
        yield
