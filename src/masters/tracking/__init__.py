"""Experiment tracking: runs, lineage and registered models in MLflow. No other package imports MLflow."""
