"""`python -m luthier_cli`, where the program `luthier` is not on the path."""

from luthier_cli import main

main()
