# One command each, the same here and in CI.
.PHONY: check test bench

check:
	ruff check .
	ruff format --check .
	mypy

test:
	pytest

bench:
	python -m benchmarks.overhead
	python -m benchmarks.rescue
