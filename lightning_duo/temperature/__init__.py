"""The two temperatures of a duo, fitted exactly."""

from lightning_duo.temperature.fit import UNWEIGHTED, TemperatureFit, Temperatures, fit_temperatures

__all__ = ["UNWEIGHTED", "TemperatureFit", "Temperatures", "fit_temperatures"]
