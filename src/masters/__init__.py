"""Distillation of vision-language models with masked teachers and offline rewards (arXiv 2512.22238)."""

import os

__version__ = "0.1.0"

# Telemetry is off unless the user turned it on; the libraries read these when they are imported.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(_name, _value)
