"""COCO captions, and VQAv2's questions with their annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nvlm_train.data.prepare.inputs.entries import (
    Entries,
    InputSpec,
    Lines,
    Parts,
    find_lines,
    load_json,
    parse_object,
    write_list,
)
from nvlm_train.data.prepare.inputs.files import Files, open_files
from nvlm_train.errors import ShardError


def open_coco(spec: InputSpec, spool: Path) -> Entries:
    """Opens COCO's annotations JSON and its image folder: a sample per image, with all its captions.

    Format: https://cocodataset.org/#format-data, section 5 (image captioning).
    """
    return _listed(spec, spool, write_list(partial(_captions, spec.paths[0]), spool))


def open_vqa(spec: InputSpec, spool: Path) -> Entries:
    """Opens VQAv2's pair of JSON files and its image folder: a sample per question.

    An answer's weight is the share of annotators who gave it. Format:
    https://visualqa.org/vqa_v2_teaser.html.
    """
    if len(spec.paths) != 2:
        raise ShardError(
            f"input={' '.join(spec.paths)}: the format vqa takes two files, questions and annotations"
        )
    return _listed(spec, spool, write_list(partial(_questions, spec), spool))


def _listed(spec: InputSpec, spool: Path, listed: str) -> Entries:
    def describe(_file: str, number: int, _line: int) -> str:
        return f"{spec.paths[0]}: entry {number}"

    parse = partial(_parts, open_files(spec.images))
    return Lines((listed,), find_lines((listed,), spool), parse, describe)


def _parts(files: Files, line: bytes) -> Parts:
    item = parse_object(line)
    if "problem" in item:
        raise ValueError(item["problem"])
    return item["record"], [(item["image"], files.read(item["image"]))]


def _captions(path: str) -> Iterator[dict[str, Any]]:
    content = load_json(path)
    by_image: dict[object, list[tuple[int, str]]] = {}
    for annotation in _list(content, "annotations", path, ("image_id", "caption")):
        caption = (int(annotation.get("id", 0)), annotation["caption"])
        by_image.setdefault(annotation["image_id"], []).append(caption)
    for image in _list(content, "images", path, ("id", "file_name")):
        captions = [text for _, text in sorted(by_image.pop(image["id"], []))]
        if captions:
            record = {"id": image["id"], "caption": captions}
            yield {"image": image["file_name"], "record": record}
        else:
            yield {"problem": f"image id={image['id']} has no caption; remove it from images"}
    for image_id in by_image:
        yield {"problem": f"captions name image_id={image_id}, which images does not have"}


def _questions(spec: InputSpec) -> Iterator[dict[str, Any]]:
    questions, annotations = (load_json(path) for path in spec.paths)
    known = ("question_id", "answers")
    answers = {
        annotation["question_id"]: annotation["answers"]
        for annotation in _list(annotations, "annotations", spec.paths[1], known)
    }
    subtype = questions.get("data_subtype") or annotations.get("data_subtype")
    template = spec.image_name or f"COCO_{subtype}_{{image_id:012d}}.jpg"
    for question in _list(
        questions, "questions", spec.paths[0], ("question_id", "image_id", "question")
    ):
        identity = question["question_id"]
        if not answers.get(identity):
            yield {"problem": f"question_id={identity} has no answers in {spec.paths[1]}"}
            continue
        record = {
            "id": identity,
            "question": question["question"],
            "answers": _weighted(answers[identity]),
        }
        try:
            image = template.format(**question)
        except (KeyError, ValueError, IndexError) as error:
            raise ShardError(
                f"image_name={template} does not fit question_id={identity}: {error!r}; "
                "write it like COCO_train2014_{image_id:012d}.jpg"
            ) from error
        yield {"image": image, "record": record}


def _weighted(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the different answers, most frequent first, then in the annotators' order."""
    counts = Counter(str(answer.get("answer", "")) for answer in answers)
    return [
        {"answer": text, "weight": count / len(answers)}
        for text, count in counts.most_common()
        if text.strip()
    ]


def _list(content: Any, name: str, path: str, required: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns the objects of `content[name]`. Raises ShardError: there is no such list of objects."""
    items = content.get(name) if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise ShardError(f"input={path} has no list {name!r}; it is another kind of file")
    for number, item in enumerate(items):
        missing = [key for key in required if not isinstance(item, dict) or key not in item]
        if missing:
            raise ShardError(
                f"input={path}: {name}[{number}] lacks {', '.join(missing)}; "
                "it is another kind of file, or damaged"
            )
    return items
