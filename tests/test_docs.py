"""The documents: every file and heading they name exists, and the drawings are what their script draws."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nvlm_train"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DRAWINGS = ROOT / "docs" / "drawings"

FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
FILE = re.compile(
    r"[\w.*/-]+\.(?:py|md|sh|sbatch|svg|toml|yaml|yml)|[\w./-]+/"
    r"|(?:benchmarks|data_recipes|docs|launch|nvlm_train|recipes|tests)/[\w/-]+"
)
NAME = re.compile(r"(?!.*\.py$)[A-Za-z_][\w.]*")
"""A function, a class, or one of its methods or fields."""
MODULE = re.compile(r"python -m ((?:benchmarks|tests|nvlm_train)[\w.]*)")
PLACEHOLDER = re.compile(r"[A-Z]{3,}(?![A-Z]*\.md)|^mine/")
"""`DIRECTORY/experiment/mine.yaml`: names that a reader puts his own for."""
STARTS = (ROOT, PACKAGE, ROOT / "docs")
"""Where the names of files in documents start."""
OWN = {"health/", "wandb/", "utils.py"}
"""Folders that a run makes, and a name that CONTRIBUTING forbids."""
TREE = ("README.md", "## The repository")
"""Where the tree stands whose first words are paths."""


def prose(document: Path) -> str:
    """The document without its blocks of commands and output."""
    return FENCED.sub("", document.read_text(encoding="utf-8"))


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower())
    return words.strip().replace(" ", "-")


def anchors(document: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in prose(document).splitlines() if line[:1] == "#"}


def exists(name: str) -> bool:
    """Whether a document's name for a file, or a pattern, means something in the repository."""
    if "/" not in name.rstrip("/"):
        return any((start / name).exists() for start in STARTS) or any(PACKAGE.rglob(name))
    return any(any(start.glob(name.rstrip("/"))) for start in STARTS)


def missing_files(text: str) -> Iterator[str]:
    for name in CODE.findall(text):
        is_ours = FILE.fullmatch(name) and name not in OWN and not PLACEHOLDER.search(name)
        if is_ours and not exists(name):
            yield name


def missing_links(text: str, document: Path) -> Iterator[str]:
    for pair in LINK.findall(text):
        link = pair[0] or pair[1]
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(document: Path) -> None:
    text = prose(document)
    assert list(missing_files(text)) == []
    assert list(missing_links(text, document)) == []
    for module in MODULE.findall(document.read_text(encoding="utf-8")):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or path.is_dir(), module


def test_a_name_that_is_wrong_is_found() -> None:
    text = "`train/loop.py` `train/loops.py` `recipes/*.yaml` `recipes/*.yml` `vision/` `visions/`"
    wrong = ["train/loops.py", "recipes/*.yml", "visions/", "tests/parities"]
    assert (
        list(missing_files(text + " `tests/parity` `tests/parities` `DIRECTORY/x.yaml`")) == wrong
    )
    links = (
        "[a](docs/install.md#with-a-gpu) [b](docs/install.md#without) [c](instal.md) ![d](no.svg)"
    )
    broken = list(missing_links(links, ROOT / "README.md"))
    assert broken == ["docs/install.md#without", "instal.md", "no.svg"]


def test_the_tree_of_the_readme_is_there() -> None:
    name, heading = TREE
    block = (ROOT / name).read_text(encoding="utf-8").split(heading, 1)[1].split("```")[1]
    paths = [line.split()[0] for line in block.splitlines() if line.strip()]
    assert len(paths) > 10
    assert [path for path in paths if not exists(path)] == []


def test_every_document_is_linked() -> None:
    """A page that nothing leads to is not found."""
    linked = {
        (document.parent / (first or second).partition("#")[0]).resolve()
        for document in DOCUMENTS
        for first, second in LINK.findall(document.read_text(encoding="utf-8"))
    }
    assert [path for path in DOCUMENTS[1:] if path.resolve() not in linked] == []


def test_the_words_of_the_glossary_are_in_order() -> None:
    rows = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    words = [row.split("|")[1].strip() for row in rows if row.startswith("| ")][1:]
    assert len(words) >= 25 and words == sorted(words)


@pytest.mark.parametrize("page", ["reading.md", "glossary.md"])
def test_functions_and_classes_that_a_page_names_are_in_the_code(page: str) -> None:
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    spans = CODE.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    names = {part for span in spans if NAME.fullmatch(span) for part in span.split(".")}
    assert len(names) >= 5
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


def test_the_drawings_are_what_the_script_draws(tmp_path: Path) -> None:
    """After a change: python docs/drawings/draw.py, and look at them."""
    subprocess.run([sys.executable, DRAWINGS / "draw.py", "--out", tmp_path], check=True)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in DRAWINGS.glob("*.svg")}
    assert set(drawn) == {"step.svg", "stacks.svg"}


def test_the_drawing_of_a_step_names_what_is_in_the_code() -> None:
    texts = [
        each.text or "" for each in ElementTree.parse(DRAWINGS / "step.svg").iter() if each.text
    ]
    files = {text for text in texts if text.endswith(".py")}
    types = {
        text
        for text in texts
        if re.fullmatch(r"[A-Z][a-z]+(?:[A-Z][a-z]+)*|[a-z]+_[a-zA-Z]+", text)
    }
    assert len(files) >= 8 and {"StepPlan", "StepBatch", "LabelLosses", "StepResult"} <= types
    assert [file for file in sorted(files) if not (ROOT / "nvlm_train" / file).is_file()] == []
    code = "\n".join(path.read_text() for path in (ROOT / "nvlm_train").rglob("*.py"))
    assert [name for name in sorted(types) if not re.search(rf"\b{name}\b", code)] == []


def train_commands() -> Iterator[str]:
    """Commands of documents that train a shipped experiment; those of extending.md have a test of theirs."""
    for document in DOCUMENTS:
        if document.name == "extending.md":
            continue
        for line in document.read_text(encoding="utf-8").splitlines():
            found = re.match(r" *nvlm train (experiment=\S+.*)", line.partition("#")[0])
            if found and "--recipes" not in line and not PLACEHOLDER.search(line):
                yield found[1].strip()


@pytest.mark.parametrize("command", sorted(set(train_commands())))
def test_a_command_that_trains_composes(command: str) -> None:
    from nvlm_train.recipe.load import load_recipe

    load_recipe(shlex.split(command))


def test_the_example_of_an_experiment_composes(tmp_path: Path) -> None:
    from nvlm_train.recipe.load import load_recipe

    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (tmp_path / "experiment").mkdir()
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "experiment" / "mine.yaml").write_text(example)
    assert load_recipe(["experiment=mine"], tmp_path).name == "mine"
