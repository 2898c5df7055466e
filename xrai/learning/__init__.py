"""From batches to trained weights, and from weights to scores."""
