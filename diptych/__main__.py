"""`python -m diptych`: the same program as `diptych`."""

from diptych.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
