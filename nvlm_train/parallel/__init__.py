"""Floor 2: process groups, devices and kernels. All that megatron-core needs of the machine."""
