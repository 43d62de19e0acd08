"""The reference models on which the callbacks are exercised, one folder each."""
