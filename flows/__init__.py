"""Prefect flows: the pipeline on one page."""
