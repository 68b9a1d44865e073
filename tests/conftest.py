"""Order of the tests: with two workers that take file after file, a long one that comes last runs alone."""

LONG = ["test_world_size.py", "test_mutants.py", "test_resume.py", "test_benchmarks_gpu.py", "test_simclrv2.py", "test_dinov2.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
