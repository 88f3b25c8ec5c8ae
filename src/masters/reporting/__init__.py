"""Plots, tables and pages of results. Imports neither Prefect nor MLflow."""
