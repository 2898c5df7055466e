"""The format of a data set and its readers: manifest, shards, order, cache, loader, checks."""
