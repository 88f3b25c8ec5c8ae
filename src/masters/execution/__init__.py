"""Child processes and engines, whatever they compute."""
