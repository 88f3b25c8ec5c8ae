"""Prefect flows: the pipeline, nightly runs, evaluation, studies, and what is started beside them."""
