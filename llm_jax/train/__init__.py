"""One step and one loop for everything that learns: what differs is the source, the objective and the hooks."""
