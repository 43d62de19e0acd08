"""Real instabilities, each with its healthy twin, and what the suite makes of them."""
