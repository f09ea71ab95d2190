"""How it learns: step, optimiser, sharding, checkpoints, loop."""
