"""Writes the tables of docs/recipes.md from recipes/experiment/nvlm_*.yaml. Imports no torch.

python docs/reference/recipe_table.py

Everything in a row follows from the recipe, composed with a tokenizer that nobody reads; the number of
GPUs is that of the command in the file's second line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nvlm_train import costs
from nvlm_train.config.paths import recipes_dir
from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.recipe.load import load_recipe

PAGE = Path(__file__).parent.parent / "recipes.md"
SIZES = ("72b", "34b", "8b", "2b", "smollm2")
RECIPES = tuple(f"nvlm_{architecture}_{size}" for size in SIZES for architecture in "dxh")
STAND_IN = (
    "model.tokenizer.path=tokenizer.json",
    "model.language.weights=null",
    "model.vision.weights=null",
)
"""What the command of a recipe names and composing does not read."""
PAPERS_LAYOUT = ("nvlm_x_72b", "nvlm_h_72b")
"""Recipes whose SFT has TP8 PP1 in Table 11 of NVLM 1.0, and more here."""
TITLES = (
    "recipe", "parameters", "of them", "GPUs", "TP x PP x DP", "GB a rank", "samples a step",
    "steps", "tokens, tiles",
)  # fmt: skip


@dataclass(frozen=True)
class Shipped:
    """One of the package's recipes of real size, as its file states it."""

    name: str
    world_size: int
    """The command starts this many ranks."""
    about: str
    """The third line of the file, without its sign."""

    @classmethod
    def read(cls, name: str) -> Shipped:
        """Reads the comments at the head of the file.

        Raises:
            ValueError: the second line has no command whose ranks are known.
        """
        path = recipes_dir() / "experiment" / f"{name}.yaml"
        _, command, about = path.read_text(encoding="utf-8").splitlines()[:3]
        return cls(name, ranks_of(command.removeprefix("# ")), about.removeprefix("# "))

    def load(self, *overrides: str) -> Recipe:
        """Composes the recipe."""
        return load_recipe([f"experiment={self.name}", *STAND_IN, *overrides])


def ranks_of(command: str) -> int:
    """Says how many ranks a command starts.

    >>> ranks_of("nvlm launch --nodes 16 experiment=a"), ranks_of("launch/torchrun.sh 8 experiment=a")
    (128, 8)
    >>> ranks_of("nvlm train experiment=a")
    1
    """
    if match := re.match(r"nvlm launch --nodes (\d+) ", command):
        return 8 * int(match[1])
    if match := re.match(r"launch/torchrun\.sh (\d+) ", command):
        return int(match[1])
    if command.startswith("nvlm train "):
        return 1
    raise ValueError(f"{command}: no command that starts a run")


def data_size(stage: StageConfig, world_size: int) -> int:
    """Data parallelism is what the layout leaves of the world."""
    return world_size // (stage.parallel.tensor * stage.parallel.pipeline)


def row(name: str) -> str:
    """The line of a recipe; a pair of values is of pretraining and of SFT."""
    shipped = Shipped.read(name)
    recipe = shipped.load()
    parts = costs.part_parameters(recipe.model)
    stages = [recipe.stages[each] for each in recipe.schedule]
    return _line(
        f"`{name}`",
        _billions(sum(parts.values())),
        ", ".join(_billions(count) for count in parts.values()),
        str(shipped.world_size),
        *_pairs([_cells(recipe, stage, shipped.world_size) for stage in stages]),
    )


def papers_row(name: str) -> str:
    """The line of a recipe in SFT with the paper's layout."""
    shipped = Shipped.read(name)
    recipe = shipped.load("parallel@stages.sft.parallel=tp8_sp")
    cells = _cells(recipe, recipe.stages["sft"], shipped.world_size)
    return _line(f"`{name}`, SFT as in Table 11", "", "", str(shipped.world_size), *cells)


def ablations() -> list[str]:
    """Names of the recipes that are a table's row in the paper, in the order of the tables."""
    names = (path.stem for path in (recipes_dir() / "experiment").glob("nvlm_*.yaml"))
    others = [name for name in names if name not in RECIPES]
    return sorted(others, key=lambda name: (Shipped.read(name).about, name))


def tables() -> str:
    """Both tables."""
    head = [_line(*TITLES), _line(*["---"] * len(TITLES))]
    lines = [*head, *map(row, RECIPES), *map(papers_row, PAPERS_LAYOUT), ""]
    lines += [_line("ablation", "what it is"), _line("---", "---")]
    lines += [_line(f"`{name}`", Shipped.read(name).about) for name in ablations()]
    return "\n".join(lines)


def replaced(page: str, content: str) -> str:
    """Puts the tables between the two marks of the page."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


BEGIN = "<!-- python docs/reference/recipe_table.py -->"
END = "<!-- end -->"


def _cells(recipe: Recipe, stage: StageConfig, world_size: int) -> list[str]:
    layout, ranks = stage.parallel, data_size(stage, world_size)
    memory = costs.rank_memory(recipe.model, stage, recipe.precision, ranks)
    return [
        f"{layout.tensor} x {layout.pipeline} x {ranks}",
        f"{memory / 1e9:.1f}",
        f"{stage.batch.size:,}",
        f"{stage.steps:,}",
        f"{stage.sequence_length:,}{_packs(stage)}, {_tiles(stage)}",
    ]


def _packs(stage: StageConfig) -> str:
    return f" in {stage.pack_length:,}" if stage.pack_length else ""


def _tiles(stage: StageConfig) -> str:
    most = stage.tiling.max_tiles
    return f"{most} + 1" if most > 1 and stage.tiling.thumbnail else str(most)


def _pairs(stages: list[list[str]]) -> list[str]:
    return [" / ".join(dict.fromkeys(pair)) for pair in zip(*stages, strict=True)]


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
