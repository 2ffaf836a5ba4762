"""`python -m flashbias.recipes`: the command line, for those who start modules, such as torchrun."""

from .cli import main

main()
