"""Order of the tests: with two workers that take file after file, a long one that comes last would run alone. And threads:
each worker computes with one, and so do the processes it starts, because several share the cores. And the process of
which commands are forks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

import pytest  # noqa: E402

LONG = ["test_world_size.py", "test_mutants.py", "test_resume.py", "test_benchmarks_gpu.py", "test_simclrv2.py", "test_dinov2.py"]


def pytest_configure(config):
    config.option.loadscopereorder = False  # of xdist, which would begin with the files that have most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """See tests/server.py. Each worker has one for all of its files."""
    from server import Server

    server = Server(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()
