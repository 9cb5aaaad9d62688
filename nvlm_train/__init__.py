"""nvlm-train: a distributed training framework for NVLM-style multimodal language models.

Floors, lowest first; every import points downward (tests/test_floors.py keeps it so):

    0  config errors logs cards              the recipe's schema; what cards can do; no torch
    1  batch tokens geometry routes tiling   what data and model exchange; pure arithmetic
    2  data parallel convert device_batch    shards to plans and pixels; topology; others' weights
    3  vision model costs recipe             encoding; NVLM-D, X and H; FLOPs and bytes; sizes from weights
    4  pipeline                              a round of packs through megatron-core's schedule
    5  evaluation                            greedy generation and scorers
    6  train                                 schedule, loop, optimizer, checkpoint, metrics
    7  demo doctor                           the demo from material to report; checks before training
    8  cli                                   the console script `nvlm`
"""

__version__ = "0.1.0"
