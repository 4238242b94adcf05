"""`python -m lightning_duo.cli`."""

from lightning_duo.cli import main

main()
