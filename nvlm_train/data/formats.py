"""The formats of raw data that `nvlm data prepare` reads; `prepare/inputs/formats.py` opens them."""

from __future__ import annotations

RAW_FORMATS = {
    "llava": "a JSON list with conversations; images in --images (folder, zip, tar)",
    "jsonl": "one record a line, with or without images; chats",
    "parquet": "Parquet files, images as bytes, structs or names",
    "datasets": "what datasets.save_to_disk wrote",
    "members": "tars (img2dataset), a zip or a folder of files that share a name",
    "coco": "COCO captions: annotations JSON; images in --images",
    "vqa": "VQAv2: questions JSON, annotations JSON; images in --images",
    "ocr": "one page a line, its text in boxes",
    "text": "plain text: a document a line, or a .txt each",
}
