"""What is refused, and what can be known, before hours are spent."""
