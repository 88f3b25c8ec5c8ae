"""Programs to read and to run beside the package; nothing of it imports them."""
