"""Settings for all tests."""

from hypothesis import settings

# The machines that run these are shared: a slow moment is no fault.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
