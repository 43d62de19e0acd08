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

# The protections that benchmarks compare with, beside the project in an environment of their own.
.bench-venv: constraints.txt benchmarks/alternatives/requirements.txt
	python3.11 -m venv $@
	$@/bin/pip install -q -c constraints.txt -e ".[models,plots]" -r benchmarks/alternatives/requirements.txt
	touch $@
