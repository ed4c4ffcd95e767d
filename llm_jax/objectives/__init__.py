"""What is minimised: functions (model, params, batch, key) -> Loss, sums and weights, never a mean."""
