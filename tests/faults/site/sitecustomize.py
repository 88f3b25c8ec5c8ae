"""Python imports this at its start where the tests put its folder into PYTHONPATH: children take part in faults."""

import os

if "MASTERS_FAULT" in os.environ:
    from tests.faults import fault_points

    fault_points.install()
