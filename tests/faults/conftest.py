"""How many tests there are, before any is left out: a report says whether it is of all of them."""

import pytest

WHOLE = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[WHOLE] = len(items)
