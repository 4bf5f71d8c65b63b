"""`python -m kvcompress` is the same program as `kvcompress`."""

from kvcompress.cli.app import main

if __name__ == "__main__":
    main()
