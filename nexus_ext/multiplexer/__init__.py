"""Several models in one memory budget: which are in memory, who computes next, what is evicted."""
