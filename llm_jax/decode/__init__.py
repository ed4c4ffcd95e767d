"""From a trained model to tokens: what the logits become, and the loop around the model."""
