"""Floor 6: the two-stage schedule, the step, checkpoints and what is reported about them.

Rooms by floor, lowest first; every import points downward (tests/test_floors.py keeps it so):

    0  optimizer schedule signals rank_zero run_lock fitting part_timer placing   each knows of no other
    1  reduce_metrics engine       a step's sums over the world; what a stage trains with on this rank
    2  step checkpoint             one optimizer step; saving, verifying, resuming
    3  tracking                    metrics.jsonl, the terminal, wandb
    4  health start                what watches a run; where a run stands, and a stage made ready
    5  loop                        `train(recipe)`
"""
