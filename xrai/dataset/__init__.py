"""From raw image files to batches of pixels: sources, manifest, splits, shards, cache and
loader.
"""
