"""Bytes of a shard: tars on a disk or behind a URL, read by offset, scanned and written."""
