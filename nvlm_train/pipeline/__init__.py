"""Floor 4: a round of microbatches through the encoder and megatron-core's pipeline schedule."""
