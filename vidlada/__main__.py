"""`python -m vidlada`."""

from vidlada.cli import main

if __name__ == "__main__":
    main(prog_name="vidlada")
