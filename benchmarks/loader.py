"""Measures samples per second from shards to tiles and token ids, beside webdataset and megatron-energon.

    python -m benchmarks.loader

Local shards of 1600 x 1200 photo-like JPEGs (about 160 kB) with one question each, page cache warm,
one core, no worker processes; CPU seconds, the sides taking turns. megatron-energon takes part
where it can be imported. Three comparisons:

- undecoded: the bytes of record and image (here with their checksums verified);
- same decoder: every side decodes, tiles and tokenises with this project's functions and joins the
  tiles of 16 samples to one tensor; and the same from one background worker, which is a thread here
  and a process of torch's DataLoader there (CPU seconds of both processes);
- own decoder: webdataset and energon decode with Pillow, tile with Pillow and normalise, as
  Megatron-LM's multimodal example does; they tokenise with this project's function.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.images import TILE, jpeg, photo, pillow_tiles, to_tensor
from nvlm_train.batch import RankShare
from nvlm_train.config.model_schema import TokenizerConfig
from nvlm_train.config.paths import PACKAGE
from nvlm_train.config.schema import BatchConfig, LoaderConfig, TilingConfig
from nvlm_train.data.images import cut_tiles, decode_image, read_size
from nvlm_train.data.loading.loader import Loader
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.data.samples.encoder import EncodingSpec, SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import write_shards
from nvlm_train.routes import ROUTES
from nvlm_train.tokens import Tokenizer

PER_SHARD, BATCH, LENGTH, MAX_PIXELS = 64, 16, 4096, 10**8
Sample = dict[str, Any]
Counted = Callable[[], int]
Cook = Callable[[Sample], tuple[Tensor, Tensor]]

PASSES = 10
"""Over the data, where nothing is decoded."""


def write_data(root: Path, count: int) -> list[str]:
    images = [jpeg(photo(seed=seed)) for seed in range(8)]
    samples = (
        (
            f"s{number:05d}",
            {"conversations": [
                {"from": "human", "value": f"<image>\nWhat is in picture {number}?"},
                {"from": "gpt", "value": "Noise of several scales, and nothing else at all."},
            ]},
            [("jpg", images[number % len(images)])],
        )
        for number in range(count)
    )  # fmt: skip
    return [shard.path for shard in write_shards(samples, str(root / "b-%06d.tar"), PER_SHARD)]


def make_encoder() -> SampleEncoder:
    spec = EncodingSpec(
        tile_size=TILE, tokens_per_tile=256, context_tokens_per_tile=256, routes=ROUTES["d"],
        tiling=TilingConfig(), sequence_length=LENGTH, prompts="sft", system_message=None,
        max_image_pixels=MAX_PIXELS,
    )  # fmt: skip
    path = str(PACKAGE / "demo/assets/language_model")
    return SampleEncoder(Tokenizer(TokenizerConfig(path=path)), spec)


class Work:
    """Does what one sample costs on either side, given its undecoded members."""

    def __init__(self, encoder: SampleEncoder) -> None:
        self.encoder = encoder

    def text(self, sample: Sample, size: tuple[int, int]) -> EncodedSample:
        return self.encoder.encode(sample["__key__"], sample["json"], [size])

    def same(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Returns token ids and uint8 tiles, by this project's functions."""
        text = self.text(sample, read_size(sample["jpg"]))
        pixels = decode_image(sample["jpg"], MAX_PIXELS)
        tiles = cut_tiles(pixels, text.grids[0], text.num_tiles, TILE)
        return torch.from_numpy(text.token_ids), tiles

    def pillow(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Returns token ids and fp32 tiles from an image that Pillow decoded."""
        image: Image.Image = sample["jpg"]
        record = sample["json"]
        raw = record if isinstance(record, bytes) else json.dumps(record).encode()
        text = self.text(sample | {"json": raw}, image.size)
        tiles = pillow_tiles(image.convert("RGB"), text.grids[0], text.num_tiles)
        return torch.from_numpy(text.token_ids), to_tensor(tiles)


def join(samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Joins samples to a batch: ids of each sample, and all tiles as one tensor."""
    return [ids for ids, _ in samples], torch.cat([tiles for _, tiles in samples])


def count_all(items: Iterator[Any]) -> int:
    return sum(1 for _ in items)


def count_batches(batches: Iterator[tuple[list[Tensor], Tensor]]) -> int:
    return sum(len(ids) for ids, _ in batches)


# ---- this project ----


def ours(plan: DataPlan, encoder: SampleEncoder, count: int, workers: int) -> int:
    config = LoaderConfig(workers=workers)
    with Loader(plan, encoder, RankShare(), config, 1 << 20, range(count // BATCH)) as loader:
        return sum(
            len(pack.samples)
            for batch in loader
            for part in batch.rounds
            for pack in part.microbatches
        )


def ours_undecoded(plan: DataPlan, count: int) -> int:
    """Yields samples in the order in which a run would read them: shuffled within windows of shards."""
    done = 0
    for step in range(count // BATCH):
        for pack in plan.step(step, 1).packs[0]:
            for sample in pack.samples:
                reader = plan.reader(sample)
                done += bool(reader.record(sample.row)) and bool(reader.image(sample.row, 0))
    return done


# ---- webdataset ----


def web(shards: list[str]) -> webdataset.WebDataset:
    return webdataset.WebDataset(shards, shardshuffle=False)


def web_sides(shards: list[str], work: Work) -> dict[str, Counted]:
    same = web(shards).map(work.same).batched(BATCH, collation_fn=join)
    own = web(shards).decode("pil").map(work.pillow).batched(BATCH, collation_fn=join)
    background = DataLoader(same, batch_size=None, num_workers=1)
    return {
        "webdataset_undecoded": lambda: count_all(iter(web(shards))),
        "webdataset_same": lambda: count_batches(iter(same)),
        "webdataset_same_worker": lambda: count_batches(iter(background)),
        "webdataset_own": lambda: count_batches(iter(own)),
    }


# ---- megatron-energon ----


def energon_sides(root: Path, count: int, work: Work) -> dict[str, Counted]:
    from megatron import energon
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    names = sorted(path.name for path in root.glob("*.tar"))
    BaseWebdatasetFactory.prepare_dataset(
        EPath(root), names, split_parts_ratio=[("train", 1.0)], workers=1
    )
    (root / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    )
    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)

    @dataclass
    class Cooked(energon.Sample):
        work: tuple[Tensor, Tensor] | None = None

    def side(cook: Cook, decoder: energon.SampleDecoder | None) -> Iterator[Any]:
        @energon.stateless
        def cooked(sample: Sample) -> Cooked:
            return Cooked(**energon.basic_sample_keys(sample), work=cook(sample))

        class Encoder(energon.DefaultTaskEncoder):
            cookers = [energon.Cooker(cooked)]  # noqa: RUF012

            @energon.stateless
            def batch(self, samples: list[Cooked]) -> list[Any]:
                return join([sample.work for sample in samples])

        Encoder.decoder = decoder
        data = energon.get_train_dataset(
            EPath(root), worker_config=config, batch_size=BATCH, shuffle_buffer_size=None,
            max_samples_per_sequence=None, task_encoder=Encoder(),
        )  # fmt: skip
        return energon.get_loader(data)

    def undecoded(sample: Sample) -> tuple[Tensor, Tensor]:
        return nothing, nothing

    nothing, pil = torch.zeros(0), energon.SampleDecoder(image_decode="pil")
    loaders = {
        "energon_undecoded": side(undecoded, None),
        "energon_same": side(work.same, None),
        "energon_own": side(work.pillow, pil),
    }
    return {
        name: lambda loader=loader: count_batches(islice(iter(loader), count // BATCH))
        for name, loader in loaders.items()
    }


# ---- measuring ----


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def rates(sides: dict[str, Counted], count: int, repeats: int, passes: int = 1) -> dict[str, float]:
    """Returns samples per CPU second of each side. The sides take turns of `passes` over the data.

    What takes milliseconds needs several: some kernels count CPU time in ticks.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            started = cpu_seconds()
            done = sum(side() for _ in range(passes))
            seconds[name].append(cpu_seconds() - started)
            assert done == passes * count, f"{name} made {done} of {passes * count} samples"
    return {name: passes * count / statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count = arguments.samples
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        shards = write_data(root, count)
        encoder = make_encoder()
        blend = Blend("b", (SourceConfig("s", tuple(Path(shard).name for shard in shards)),))
        plan = DataPlan(
            open_sources(blend, Store(directory), encoder), BatchConfig(BATCH), LENGTH, 1, 0.0
        )
        sides = {
            "ours_undecoded": lambda: ours_undecoded(plan, count),
            "ours_same": lambda: ours(plan, encoder, count, workers=0),
            "ours_same_worker": lambda: ours(plan, encoder, count, workers=1),
        }
        sides |= web_sides(shards, Work(encoder))
        if importlib.util.find_spec("megatron.energon") is not None:
            sides |= energon_sides(root, count, Work(encoder))
        quick = {name: side for name, side in sides.items() if name.endswith("_undecoded")}
        slow = {name: side for name, side in sides.items() if name not in quick}
        rates(quick, count, 1)  # warms the page cache
        found = rates(quick, count, arguments.repeats, PASSES)
        found |= rates(slow, count, arguments.repeats)
    figures = {f"{name}_per_second": round(rate, 1) for name, rate in found.items()}
    for name, rate in found.items():
        other, _, kind = name.partition("_")
        base = found["ours_same" if kind == "own" else f"ours_{kind}"]
        if other != "ours":
            figures[f"{kind}_ratio_to_{other}"] = round(base / rate, 2)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
