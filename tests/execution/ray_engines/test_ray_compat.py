"""Private parts of Ray are used in one module, which was written for one version."""

from importlib.metadata import version

from masters.execution.ray_engines import ray_compat


def test_the_private_parts_of_ray_are_those_of_the_pinned_version() -> None:
    assert version("ray") == ray_compat.VERSION == "2.60.0", "check masters.execution.ray_engines.ray_compat again"
