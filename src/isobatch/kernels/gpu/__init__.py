"""What the GPU kernels share. Imported only when a GPU, or Triton's interpreter, is asked for."""
