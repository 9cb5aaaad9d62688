"""Floor 2: process groups, devices and kernels. Everything that megatron-core needs to know of the machine."""
