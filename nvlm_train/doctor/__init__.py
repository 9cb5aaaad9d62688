"""Floor 7: what `nvlm doctor` looks at before GPUs are taken. Each check yields findings as it makes them."""
