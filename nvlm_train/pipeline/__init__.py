"""Floor 4: runs a round of microbatches through the encoder and megatron-core's pipeline schedule."""
