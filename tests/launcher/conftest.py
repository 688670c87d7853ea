"""One zygote with fake workers for all tests of this folder that leave it as it was."""

import os
import uuid
from collections.abc import Iterator

import pytest

from shoal.launcher.processes import PRELOAD, Zygote
from tests.launcher.harness import TAG


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Tagged, so that its children can be told from other processes."""
    os.environ[TAG] = uuid.uuid4().hex
    zygote = Zygote((*PRELOAD, "tests.launcher.fake_worker"))
    zygote.loaded(120)
    yield zygote
    zygote.close()


@pytest.fixture
def tag(zygote: Zygote) -> str:
    """What the zygote's children carry in their environment."""
    return os.environ[TAG]
