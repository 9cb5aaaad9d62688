"""The table of input formats: one line, one format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nvlm_train.data.prepare.inputs.annotations import open_coco, open_vqa
from nvlm_train.data.prepare.inputs.chats import open_jsonl, open_llava, open_text
from nvlm_train.data.prepare.inputs.entries import Entries, InputSpec
from nvlm_train.data.prepare.inputs.members import open_members
from nvlm_train.data.prepare.inputs.ocr import open_ocr
from nvlm_train.data.prepare.inputs.tables import open_dataset, open_parquet
from nvlm_train.errors import ShardError

Open = Callable[[InputSpec, Path], Entries]

FORMATS: dict[str, Open] = {
    "llava": open_llava,
    "jsonl": open_jsonl,
    "parquet": open_parquet,
    "datasets": open_dataset,
    "members": open_members,
    "coco": open_coco,
    "vqa": open_vqa,
    "ocr": open_ocr,
    "text": open_text,
}

LISTED = ("llava", "jsonl", "coco", "vqa", "ocr", "text")
"""The formats whose files list entries; the images lie elsewhere."""

_SINGLE = ("llava", "datasets", "coco")
_MAPPED = ("llava", "jsonl", "parquet", "datasets", "members")


def open_entries(spec: InputSpec, spool: Path) -> Entries:
    """Opens the entries of an input; `spool` is a directory for lists, kept for the next process.

    Raises:
        ShardError: the input as a whole cannot be read, or is empty.
    """
    if spec.format in _SINGLE and len(spec.paths) > 1:
        raise ShardError(
            f"input={' '.join(spec.paths)}: the format {spec.format} takes one input; "
            "prepare the others under other names"
        )
    if spec.fields.digest and spec.format not in _MAPPED:
        raise ShardError(
            f"field: the format {spec.format} has fixed fields; only {', '.join(_MAPPED)} map them"
        )
    spool.mkdir(parents=True, exist_ok=True)
    entries = FORMATS[spec.format](spec, spool)
    if not len(entries):
        raise ShardError(f"input={' '.join(spec.paths)} has no entries; correct the path")
    return entries
