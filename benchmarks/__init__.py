"""What the suite costs and what it saves, measured."""
