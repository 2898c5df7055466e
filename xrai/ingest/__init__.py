"""From raw chest X-rays to a data set: sources, labels, decoding, splits, leaks, shards, card."""
