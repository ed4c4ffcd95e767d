"""Learning-rate schedules, update rules, clipping, decay, averaging and batch-size ramps. optax first; own code where it has none."""
