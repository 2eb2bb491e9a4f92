"""What this machine has and may offer: resources, benchmarks, GPUs."""
