"""`python -m datamerge`."""

from datamerge.cli import run

if __name__ == "__main__":
    run()
