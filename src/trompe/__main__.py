"""python -m trompe: the command line where no `trompe` is on the path."""

from trompe.cli import main

if __name__ == "__main__":
    main()
