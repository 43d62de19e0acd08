# One command each, the same here and in CI.
.PHONY: check docs dist test test-long test-ranks test-deepspeed test-loggers compat experiments bench bench-all bench-quick lightning-tests gpu gpu-wheels

check:
	ruff check .
	ruff format --check .
	mypy

# The documentation, in docs/_build/html, after `pip install -e ".[docs]"`: a warning is an error. Nothing is fetched, and
# the notebooks are shown as they are committed.
docs:
	python -m sphinx -q -W --keep-going -n docs docs/_build/html

# The sdist and the wheel that is built from it in dist/, checked, after `pip install -e ".[dist,dev]"`.
dist:
	rm -rf build dist
	python -m build
	twine check --strict dist/*
	LIT_STABILITY_WHEEL=$$(ls $(CURDIR)/dist/*.whl) pytest -q tests/test_wheel.py

test:
	pytest

# The tests with other versions of Python, torch and Lightning: 7 GB and ten minutes of the processor
# each, never in CI.
compat:
	python -m benchmarks.compat

# What is too long for CI; seven minutes on two cores.
test-long:
	mkdir -p runs && pytest -q -n 2 -m long tests > runs/long_tests.log; tail -n 20 runs/long_tests.log
	{ printf '`make test-long`, %s:\n\n' "$$(date +%F)"; tail -n 1 runs/long_tests.log; } \
		> benchmarks/results/long_tests.md

# Ranks that are killed, crash and are preempted, and restarts by torchrun.
test-ranks:
	mkdir -p runs && pytest -q -s -m "long or not long" tests/test_kill_ranks.py tests/restart/test_ranks.py \
		tests/callbacks/test_last_known_good_ranks.py > runs/rank_tests.log; tail -n 20 runs/rank_tests.log
	{ printf '`make test-ranks`, %s:\n\n' "$$(date +%F)"; grep "steps lost" runs/rank_tests.log; \
		tail -n 1 runs/rank_tests.log; } > benchmarks/results/rank_tests.md

# FSDP1, tensor parallelism, and DeepSpeed if its extra is installed: seven minutes.
test-deepspeed:
	mkdir -p runs && pytest -q -m "long or not long" tests/test_sharded.py > runs/sharded_tests.log; \
		tail -n 20 runs/sharded_tests.log
	{ printf '`make test-deepspeed`, %s:\n\n' "$$(date +%F)"; tail -n 1 runs/sharded_tests.log; } \
		> benchmarks/results/sharded_tests.md

# The adapters and the doctor with W&B, MLflow, Comet and apprise themselves, after `pip install -e ".[loggers,alerts]"`; in CI
# stubs stand in. After an update of these: `python -m tests.loggers.record`.
test-loggers:
	pytest -q tests/loggers/test_real_loggers.py tests/callbacks/test_alerts.py

# All reference experiments: ten minutes of the processor. The tests run the short ones.
experiments:
	lit-stability experiments --all --out runs/experiments
	cp runs/experiments/experiments.md runs/experiments/experiments.json benchmarks/results/
	printf '\n`make experiments`, %s.\n' "$$(date +%F)" >> benchmarks/results/experiments.md

# What the suite costs and saves, in benchmarks/results: half an hour on two cores that do nothing else.
# `make .bench-venv bench` has the published protections measured too.
BENCH = $$(test -x .bench-venv/bin/python && echo .bench-venv/bin/python || echo python)

bench:
	$(BENCH) -m benchmarks.overhead
	$(BENCH) -m benchmarks.snapshot
	$(BENCH) -m benchmarks.rank_saves
	$(BENCH) -m benchmarks.memory
	$(BENCH) -m benchmarks.soak & soak=$$!; \
	$(BENCH) -m benchmarks.scale && $(BENCH) -m benchmarks.locate && \
	$(BENCH) -m benchmarks.prediction --quick --out benchmarks/results; \
	failed=$$?; wait $$soak && exit $$failed
	$(BENCH) -m benchmarks.rescue
	$(BENCH) -m benchmarks.readme

# And what takes longer: the detectors on millions of steps, the divergences on 700 runs.
bench-all: bench
	$(BENCH) -m benchmarks.overhead --parts suites
	$(BENCH) -m benchmarks.tab
	$(BENCH) -m benchmarks.clipping
	$(BENCH) -m benchmarks.changes
	$(BENCH) -m benchmarks.healthy
	$(BENCH) -m benchmarks.corpus
	$(BENCH) -m benchmarks.log_doctor
	$(BENCH) -m benchmarks.probes cost
	$(BENCH) -m benchmarks.instabilities
	$(BENCH) -m benchmarks.qk_clip
	$(BENCH) -m benchmarks.mechanisms
	$(BENCH) -m benchmarks.integrity
	$(BENCH) -m benchmarks.false_alarms
	$(BENCH) -m benchmarks.prediction

# The first in minutes, in benchmarks/results/quick: whether all of it runs, not what it costs.
bench-quick:
	$(BENCH) -m benchmarks.overhead --quick
	$(BENCH) -m benchmarks.scale --quick
	$(BENCH) -m benchmarks.snapshot --quick
	$(BENCH) -m benchmarks.rank_saves --quick
	$(BENCH) -m benchmarks.memory --quick
	$(BENCH) -m benchmarks.locate --quick
	$(BENCH) -m benchmarks.prediction --quick
	$(BENCH) -m benchmarks.corpus --quick
	$(BENCH) -m benchmarks.soak --quick
	$(BENCH) -m benchmarks.readme --quick

# Lightning's own tests with the suite in every Trainer: `make lightning-tests CHECKOUT=path` of its repository.
lightning-tests:
	python -m benchmarks.lightning_tests $(CHECKOUT)

# On a machine with a GPU and torch: the tests that need a GPU, then what the suite
# costs there, in benchmarks/results/gpu.md. Without a network: `make gpu-wheels` on another machine,
# carry the folder along, and `make gpu WHEELS=.wheels PYTHON=python3`.
PYTHON = python
WHEELS =
gpu:
	test -z "$(WHEELS)" || $(PYTHON) -m pip install -q --no-index --no-deps --upgrade \
		--target $(WHEELS)/site $(WHEELS)/*.whl
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(WHEELS)/site $(PYTHON) -m pytest -q tests/gpu
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(WHEELS)/site $(PYTHON) -m benchmarks.gpu
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(WHEELS)/site $(PYTHON) -m benchmarks.memory --accelerator gpu

# What is pure Python; numpy, PyYAML, protobuf and grpcio are taken to be there.
gpu-wheels:
	$(PYTHON) -m pip wheel -q --no-deps -c constraints.txt -w .wheels lightning pytorch-lightning \
		lightning-utilities torchmetrics tensorboard omegaconf packaging \
		pytest pygments pluggy iniconfig fsspec tqdm

# The protections that benchmarks compare with, beside the project in an environment of their own.
.bench-venv: constraints.txt benchmarks/alternatives/requirements.txt
	python3.11 -m venv $@
	$@/bin/pip install -q -c constraints.txt -e ".[models,plots]" -r benchmarks/alternatives/requirements.txt
	touch $@
