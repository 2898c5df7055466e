"""The benchmarks, beside each other and beside peers."""
