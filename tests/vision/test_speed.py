"""The encoder at speed: calls into ATen, batches without copies, one compilation, and the same features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.geometry import encoder_batch
from nvlm_train.vision import compiled
from nvlm_train.vision.build import build_vision_encoder
from nvlm_train.vision.encoder import KINDS, VisionEncoder
from nvlm_train.vision.intern_vit import InternViT
from nvlm_train.vision.tile_parallel import encode_tiles
from tests.vision.test_intern_vit import CONFIG, tiles

SEPARATE = {
    "intern_vit_6b": (-24.559102588, 2274.443908238),
    "intern_vit_300m": (-212.818212534, 2255.551280766),
    "siglip": (0.0, 12344.330770435),
}
"""Sums of features, and of their magnitudes, when queries, keys and values were three matrices (commit
d19a661): six tiles of seed 0, random weights of seed 1."""


CALLS_BEFORE = {
    ("intern_vit_6b", torch.float32): 212, ("intern_vit_6b", torch.bfloat16): 237,
    ("intern_vit_300m", torch.float32): 134, ("intern_vit_300m", torch.bfloat16): 135,
    ("siglip", torch.float32): 132, ("siglip", torch.bfloat16): 133,
}  # fmt: skip
"""Calls into ATen of a batch through three layers at commit d19a661, by kind and dtype. Today it is 174, 199,
96, 97, 94 and 95."""


def build(
    kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes: Any
) -> VisionEncoder:
    config = replace(CONFIG, kind=kind, **sizes)
    return build_vision_encoder(config, dtype, torch.device(device), seed=1)


class Calls(TorchDispatchMode):
    """Counts calls into ATen by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_those_of_before(kind: str) -> None:
    """A run with random weights goes on with the encoder that it began with."""
    features = encode_tiles(build(kind), tiles(6)).double()
    found = (features.sum().item(), features.abs().sum().item())
    assert found == pytest.approx(SEPARATE[kind], rel=1e-5, abs=1e-2)


def test_other_weights_would_be_noticed() -> None:
    """Negative control: queries, keys and values drawn as one matrix of another order."""
    encoder = build("intern_vit_300m")
    for layer in encoder.encoder["layer"].children():
        weight = layer.attention.qkv.weight
        weight.copy_(weight.roll(CONFIG.hidden_size, 0))
    features = encode_tiles(encoder, tiles(6)).double()
    assert features.sum().item() != pytest.approx(SEPARATE["intern_vit_300m"][0], abs=1e-2)


class Spy:
    """An encoder that shows what it gets."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, config: VisionConfig) -> None:
        self.config = config
        self.batches: list[Tensor] = []

    def __call__(self, tiles_TCEE: Tensor) -> Tensor:
        self.batches.append(tiles_TCEE)
        return (
            torch.ones(len(tiles_TCEE), 16, 160) * tiles_TCEE.float().mean((1, 2, 3))[:, None, None]
        )

    def named_parameters(self) -> Iterator[Any]:
        return iter(())


def test_only_the_last_batch_is_filled_and_only_that_is_copied() -> None:
    spy, every = Spy(CONFIG), tiles(10)
    features = encode_tiles(spy, every)
    assert [len(batch) for batch in spy.batches] == [4, 4, 4]
    for number, batch in enumerate(spy.batches[:2]):
        assert batch.data_ptr() == every[4 * number :].data_ptr(), "a full batch is no copy"
    assert torch.equal(spy.batches[2][:2], every[8:]) and not spy.batches[2][2:].any()
    assert torch.equal(features[:, 0, 0], every.float().mean((1, 2, 3)))


def test_without_tiles_nothing_is_encoded() -> None:
    spy = Spy(CONFIG)
    assert encode_tiles(spy, tiles(4)[:0]).shape == (0, 16, 160) and not spy.batches


@pytest.mark.parametrize("kind", KINDS)
def test_features_can_be_trained_on(kind: str) -> None:
    """The projector keeps them for its backward, which tensors of inference mode refuse."""
    features = encode_tiles(build(kind), tiles(3))
    assert not features.is_inference() and not features.requires_grad
    weight = torch.ones(160, requires_grad=True)
    (features * weight).sum().backward()
    torch.testing.assert_close(weight.grad, features.sum((0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_into_aten(kind: str, dtype: torch.dtype) -> None:
    """Of a batch, with what composite operators call in turn. (A GPU has one kernel for an RMSNorm of
    InternViT-6B, where a CPU has six, and eight in bf16.)"""
    encoder = build(kind, dtype)
    with torch.no_grad(), Calls() as calls:
        encoder(tiles(4))
    assert len(calls.names) <= 0.85 * CALLS_BEFORE[kind, dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_made_on_the_host_for_a_call(kind: str) -> None:
    encoder = build(kind)
    encoder(tiles(4))
    with Calls() as calls:
        encoder(tiles_ := tiles(4))
    assert tiles_.dtype == torch.uint8
    assert not {"lift_fresh", "lift_fresh_copy", "scalar_tensor", "_local_scalar_dense"} & set(
        calls.names
    )


def test_batches_by_memory() -> None:
    """The recipe's own; else as the layer's widest states fit, and never more than make it faster."""
    assert encoder_batch(CONFIG) == 4
    by_memory = replace(CONFIG, batch_tiles=None)
    six_b = replace(
        by_memory,
        num_layers=45,
        hidden_size=3200,
        ffn_hidden_size=12_800,
        tile_size=448,
        patch_size=14,
    )
    assert encoder_batch(six_b) == 8
    assert encoder_batch(replace(six_b, hidden_size=1024, ffn_hidden_size=4096)) == 16
    assert encoder_batch(replace(six_b, tile_size=448 * 8)) == 1
    assert encoder_batch(by_memory) == 16


def test_on_a_cpu_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(method: Any) -> Any:
        raise AssertionError(f"{method} is compiled")

    monkeypatch.setattr(compiled, "_compiled", refuse)
    for kind in KINDS:
        encode_tiles(build(kind), tiles(3))


def compiled_by(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Makes `compiled_on_gpu` compile on this machine."""
    found: dict[Any, Any] = {}

    def compile_once(method: Any) -> Any:
        if method not in found:
            found[method] = torch.compile(method, dynamic=False, **options)
        return found[method]

    monkeypatch.setattr(compiled, "_compiled", compile_once)
    monkeypatch.setattr(compiled, "runs_compiled", lambda x: True)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_serves_all_layers_and_batches(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer is one graph without breaks, whatever its number; another encodes pixels."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    expected = encode_tiles(build(kind), tiles(10))
    compiled_by(monkeypatch, backend=counter, fullgraph=True)
    found = encode_tiles(build(kind), tiles(10))
    assert torch.equal(found, expected)
    assert counter.frame_count == 2, "the embedding, and a layer for all three"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["intern_vit_6b"])
def test_compiled_features_do_not_depend_on_company(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's compiler itself, with the options of GPUs: close to the others, and bitwise among them."""
    every = tiles(7)
    expected = encode_tiles(build(kind), every)
    compiled_by(monkeypatch, options=compiled.compiler_options())
    together = encode_tiles(build(kind), every)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-4)
    order = [5, 0, 3, 6, 1, 4, 2]
    assert torch.equal(encode_tiles(build(kind), every[order]), together[order])
    for number in range(7):
        alone = encode_tiles(build(kind), every[number : number + 1])
        assert torch.equal(alone[0], together[number])
    torch._dynamo.reset()
    assert torch.equal(encode_tiles(build(kind), every), together), "compiled anew"


def test_every_option_of_the_compiler_is_known() -> None:
    assert compiled.compiler_options() == {
        "deterministic": True, "shape_padding": False, "max_autotune": False,
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_features_on_a_gpu(kind: str) -> None:
    """bf16: bitwise the same in any company, and near those of the CPU in fp32."""
    every, sizes = tiles(7), {"hidden_size": 160, "num_heads": 5, "ffn_hidden_size": 320}
    encoder = build(kind, torch.bfloat16, "cuda", **sizes)
    together = encode_tiles(encoder, every)
    expected = encode_tiles(build(kind, **sizes), every)
    error = (together.float().cpu() - expected).norm() / expected.norm()
    assert error < 2e-2
    order = [5, 0, 3, 6, 1, 4, 2]
    assert torch.equal(encode_tiles(encoder, every[order].pin_memory()), together[order])
    for number in range(7):
        assert torch.equal(encode_tiles(encoder, every[number : number + 1])[0], together[number])
    torch._dynamo.reset()
    assert torch.equal(encode_tiles(encoder, every), together), "compiled anew, as by another rank"


def test_a_cast_keeps_queries_keys_and_values_together() -> None:
    encoder = InternViT(CONFIG).to(torch.bfloat16)
    assert encoder.encoder["layer"][0].attention.qkv.weight.shape == (120, 40)
    assert encoder(tiles(2)).dtype == torch.bfloat16
