"""`python -m robustlip`."""

from robustlip.cli import main

if __name__ == "__main__":
    main()
