"""Raw formats as numbered entries, each of which any process can read by itself.

`formats.FORMATS` is the table: one line, one format. An entry is read as a record and its images;
what is wrong with one entry is a ValueError, what is wrong with the whole input a ShardError.
"""
