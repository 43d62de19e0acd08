"""What a run writes for TensorBoard and other loggers."""
