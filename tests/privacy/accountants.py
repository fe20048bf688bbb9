"""Epsilon by another library."""

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant


def independent(noise, probability, steps, delta, interval=1e-3):
    """Compute it with privacy loss distributions."""
    accountant = PLDAccountant(value_discretization_interval=interval)
    event = dp_event.PoissonSampledDpEvent(probability, dp_event.GaussianDpEvent(noise))
    accountant.compose(dp_event.SelfComposedDpEvent(event, steps))
    return accountant.get_epsilon(delta)
