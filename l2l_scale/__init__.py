"""Meta-training learned optimizers at scale."""
