"""What eviction costs and saves in vLLM, beside the same vLLM without it."""
