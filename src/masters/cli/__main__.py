"""`python -m masters.cli` is the command `masters`."""

from masters.cli.main import main

if __name__ == "__main__":
    main()
