"""Floor 7: the checks of `nvlm doctor`, made before GPUs are used. Each check yields findings one by one."""
