"""Counts the tests before any is deselected, so that a report can say whether it covers all of them."""

import pytest

WHOLE = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[WHOLE] = len(items)
