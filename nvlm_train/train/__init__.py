"""Floor 6: the two-stage schedule, the step, checkpoints and what is reported about them."""
