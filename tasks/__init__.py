"""One thin Prefect task a stage. `stage.py` holds what they share: reuse, timing, tracking."""
