"""Real instabilities with healthy twins, and how the suite handles them."""
