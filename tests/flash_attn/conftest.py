from collections.abc import Iterator

import pytest
import torch

from tests.testing import profiles

profiles.load()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
