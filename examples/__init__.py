"""Example programs. The package imports nothing from them."""
