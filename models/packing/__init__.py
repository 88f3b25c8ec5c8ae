"""Questions and their responses in rows that share what they have in common."""
