"""``python -m bayling_delta``."""

from bayling_delta.cli import main

main()
