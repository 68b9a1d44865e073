"""Order of the tests: with two workers that take file after file, a long one that comes last would run alone."""

LONG = ["test_world_size.py", "test_mutants.py", "test_resume.py", "test_benchmarks_gpu.py", "test_simclrv2.py", "test_dinov2.py"]


def pytest_configure(config):
    config.option.loadscopereorder = False  # of xdist, which would begin with the files that have most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
