"""Settings that hold for every test."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Derandomized: a red run is red for everyone. No deadline: the first example pays for tracing.
settings.register_profile(
    "ci",
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("deep", parent=settings.get_profile("ci"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", autouse=True)
def _bundles_of_expected_failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests make runs fail on purpose; the bundles of that go away with the session's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANISH_REPRO_DIR", str(tmp_path_factory.mktemp("bundles")))
        yield
