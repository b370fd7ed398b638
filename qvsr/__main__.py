"""``python -m qvsr STAGE``."""

from qvsr.cli import main

if __name__ == "__main__":
    main()
