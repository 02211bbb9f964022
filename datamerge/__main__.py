"""`python -m datamerge`; torchrun starts the command in this way too."""

# ruff: noqa: PTH100, PTH109, PTH120 - importing pathlib before the path is fixed could load a user's module
import os
import sys

# `-m` puts the working directory first on sys.path, so a user's trainer/ or types.py would hide ours or that of the
# standard library. In a checkout the packages are imported from that directory, so it stays.
if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from datamerge.cli import run

if __name__ == "__main__":
    run()
