"""What real kernels do: correctness, evictions and decoding on a CUDA device, within a few minutes."""
