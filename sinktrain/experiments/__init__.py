"""Whole experiments over all of the above: how fast decoding is."""
