"""The world of the rehearsal, made once."""

from collections.abc import Iterator

import pytest

from tests.rehearsal.world import World, world


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="build the suite's variants as it has them, with GPTQ too")


@pytest.fixture(scope="session")
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The hub and the user's folder."""
    with world(tmp_path_factory.mktemp("rehearsal"), whole=request.config.getoption("--whole")) as made:
        yield made
