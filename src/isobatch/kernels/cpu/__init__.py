"""What the CPU kernels share: the compiler, the panel product, elementary functions."""
