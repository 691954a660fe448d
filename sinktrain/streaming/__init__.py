"""Endless decoding and exact evaluation with a cache of constant size."""
