"""Floor 3: NVLM on megatron-core's layers. Knows no data format, no recipe stage and no optimizer."""
