"""`python -m datamerge`, which is also how torchrun starts it."""

# ruff: noqa: PTH100, PTH109, PTH120 - pathlib is imported from the right place only after this
import os
import sys

# `-m` puts the working directory in front of what is installed, so that a user's own trainer/ or evaluation.py would
# be imported in place of ours, and whatever pathlib needs. In a checkout it is where we were found, and stays.
if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from datamerge.cli import run

if __name__ == "__main__":
    run()
