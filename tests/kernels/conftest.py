import pytest


@pytest.fixture(params=[5, pytest.param(100, marks=pytest.mark.slow)])
def repeats(request: pytest.FixtureRequest) -> int:
    """How often a kernel is run again, to have the same bits each time."""
    return request.param
