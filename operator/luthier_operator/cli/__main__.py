"""`python -m luthier_operator.cli`, where the program `luthier` is not on the path."""

from luthier_operator.cli import main

main()
