"""The tools' tests run under jax's strict promotion, as those of the packages do."""

from jax_settings import strict_promotion  # noqa: F401 - a fixture for all tests here
