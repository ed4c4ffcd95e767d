"""Learning rates, update rules, clipping, decay, averages and batch-size ramps: optax where it has them."""
