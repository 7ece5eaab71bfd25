"""Run ``python -m kvpolicy.cli``."""

from kvpolicy.cli import main

main()
