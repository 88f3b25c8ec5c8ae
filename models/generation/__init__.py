"""Models answer questions."""
