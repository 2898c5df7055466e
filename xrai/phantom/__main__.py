"""`python -m xrai.phantom`: draw a folder of phantoms."""

from xrai.errors import run_command
from xrai.phantom.draw import main

if __name__ == "__main__":
    run_command(main)
