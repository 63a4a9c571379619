"""One process group for all tests of this folder: DeepSpeed keeps the first one it meets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from uniopd_mm.distributed import World, close_world, init_world


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process alone."""
    yield init_world(60)
    close_world()
