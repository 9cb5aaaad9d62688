"""Every kind of vision encoder: its features are transformers', its table is complete, and it trains."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from nvlm_train import costs
from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.convert import vision as tables
from nvlm_train.errors import CheckpointError, ConfigError
from nvlm_train.vision import encoder
from nvlm_train.vision.build import build_vision_encoder
from tests.hugging_face import transformers_encoder
from tests.parity import gradients
from tests.parity.recipes import MODEL
from tests.vision.placed import placed
from tests.vision.siglip import features_of_siglip
from tests.vision.test_intern_vit import CONFIG, features_of_transformers, tiles
from tests.workers import WorkerPool

KINDS = list(encoder.KINDS)
FEATURES = {
    "intern_vit_6b": features_of_transformers,
    "intern_vit_300m": features_of_transformers,
    "siglip": features_of_siglip,
}
"""What transformers' model makes of tiles, by kind."""


def build(config: VisionConfig) -> encoder.VisionEncoder:
    return build_vision_encoder(config, torch.float32, torch.device("cpu"), seed=1)


def test_both_tables_have_the_same_kinds() -> None:
    assert tables.KINDS.keys() == encoder.KINDS.keys()


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(each, marks=[] if each == "siglip" else pytest.mark.slow) for each in KINDS],
)
def test_features_are_those_of_transformers(kind: str, shard_size: str, tmp_path: Path) -> None:
    model = transformers_encoder(replace(CONFIG, kind=kind))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shard_size == "50GB")
    found = build(replace(CONFIG, kind=kind, weights=str(tmp_path)))(tiles(3))
    expected = FEATURES[kind](model, tiles(3))
    assert expected.std() > 0.5, "features of about zero would prove nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(each, marks=[] if each == "siglip" else pytest.mark.slow) for each in KINDS],
)
def test_the_table_lists_the_tensors_that_the_code_has(kind: str) -> None:
    config = replace(CONFIG, kind=kind)
    layout = tables.KINDS[kind][0]
    assert placed(build(config), layout, config) == layout.files.shapes(config)
    assert costs.vision_parameters(config) == sum(
        parameter.numel()
        for name, parameter in transformers_encoder(config).named_parameters()
        if not name.startswith("head.")
    )


@pytest.mark.parametrize(
    "kind",
    [pytest.param(each, marks=[] if each == "siglip" else pytest.mark.slow) for each in KINDS],
)
def test_two_steps_are_those_of_one_process(workers: WorkerPool, kind: str) -> None:
    model = replace(MODEL, vision=replace(MODEL.vision, kind=kind))
    run = partial(gradients.losses_of_training, model=model)
    split, _ = workers.run(4, run, ParallelConfig(tensor=2, pipeline=2), 2)[0]
    alone, _ = workers.run(1, run, ParallelConfig(), 2)[0]
    assert split == pytest.approx(alone, rel=1e-5)
    assert split[0] != split[1]


@pytest.mark.parametrize(
    ("kind", "other"), [(kind, other) for kind in KINDS for other in KINDS if kind != other]
)
def test_weights_of_the_other_kind_say_which_it_is(kind: str, other: str, tmp_path: Path) -> None:
    transformers_encoder(replace(CONFIG, kind=other)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        build(replace(CONFIG, kind=kind, weights=str(tmp_path)))
    assert f"model.vision.kind={kind}" in str(caught.value)
    assert f"set model.vision.kind={other}" in str(caught.value)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind=siglip2 is no kind .*; use intern_vit_6b or"):
        build(replace(CONFIG, kind="siglip2"))


def test_the_doctor_names_an_unknown_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nvlm_train.cli import main

    report = tmp_path / "report.json"
    arguments = ["experiment=smoke", "model.vision.kind=siglip2", f"run_dir={tmp_path / 'run'}"]
    assert main(["doctor", *arguments, "--json", str(report)]) == 1
    found = json.loads(report.read_text())
    assert any("model.vision.kind=siglip2" in each["text"] for each in found["findings"])
