"""One thin Prefect task per stage. `build_or_reuse.py` holds what they share: reuse, timing, tracking."""
