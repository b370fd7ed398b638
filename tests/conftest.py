"""Two worker processes share two cores, and sums depend on the number of threads: every test computes on one."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")


def pytest_collection_modifyitems(items):
    """The workflow's tests are the long ones: they start first."""
    items.sort(key=lambda item: "tests/workflow/" not in item.nodeid)
