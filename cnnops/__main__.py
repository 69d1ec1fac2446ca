"""``python -m cnnops``."""

from .cli import main

main(prog_name="cnnops")
