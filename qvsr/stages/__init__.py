"""One module a stage: what `python -m qvsr STAGE` does, between the command line and the packages that know how."""
