"""`python -m sret_cli` is `sret`."""

from sret_cli.commands.app import main

if __name__ == "__main__":
    main()
