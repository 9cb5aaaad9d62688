"""Shards to plans to batches. A batch is a pure function of (recipe, index, step).

Rooms by floor, lowest first; every import points downward (tests/test_floors.py keeps it so):

    0  ordering processes formats images   permutations; worker processes; names of raw formats; pixels
    1  shards samples                      bytes of a tar; a record to tokens, slots and labels
    2  index                               where a shard's samples lie, how large and how long they are
    3  prepare plan                        raw files to shards; which samples make step n
    4  loading                             step n of the plan to tensors
    5  dataset                             `build_data`: a recipe's stage to its plan and encoder
    6  counting checking viewing           packs counted ahead; `nvlm data check`; `nvlm data show`
"""
