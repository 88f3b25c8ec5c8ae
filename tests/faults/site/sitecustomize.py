"""Python imports this at startup if PYTHONPATH has its folder, so that child processes install faults."""

import os

if "MASTERS_FAULT" in os.environ:
    from tests.faults import fault_points

    fault_points.install()
