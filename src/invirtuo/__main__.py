"""`python -m invirtuo` is the command line."""

from invirtuo.cli import main

main()
