"""Writers for TensorBoard and other loggers, and the Stability tab of TensorBoard."""
