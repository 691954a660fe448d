"""Windows and a model become checkpoints."""
