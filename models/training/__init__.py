"""The student learns."""
