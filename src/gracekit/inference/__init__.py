"""INT4 generation."""
