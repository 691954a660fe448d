"""The network, what a sink is, and how checkpoints become models."""
