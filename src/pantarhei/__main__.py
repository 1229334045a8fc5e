"""`python -m pantarhei` is the command `pantarhei`."""

from pantarhei.cli.main import entry

if __name__ == "__main__":
    entry()
