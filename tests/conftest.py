"""Settings that hold for every test."""

import os

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
