"""Drawn chest X-rays, to try things out with."""
