"""What people look at. Imports neither Prefect nor MLflow."""
