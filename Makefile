# make demo     serve the tiny model with and without its head, and compare
# make serve    keep it served, on port 8000
# make quick    lint, types, and the fast tests of everything that needs no vLLM
# make test     all tests, against both supported versions of vLLM
# make kernels-compiled    every kernel and shape, compiled for every GPU with the Tritons that vLLM brings there
# make gpu-check    on a GPU: are the kernels right, and how fast are they
# make engine-check    the same for the whole engine, in phases that go on where they stopped
# make soak MINUTES=30    mixed traffic on a real server, and whether it is afterwards what it was before
# make vllm-tests   vLLM's own tests, with stock vLLM and with our method
# make compatibility    what goes together with Orthrus, asked of both vLLMs; renews docs/compatibility.md
# make evidence [FILES=...]    the figures that pages tell, measured and counted anew (benchmarks/evidence/README.md)
# make docs     the documentation as a site, in runs/site
# make reference    what the documentation says of settings, patches and evidence, from the code and from the files
# make lint, unit, kernels, rehearsal, engine, engine-newer, serve-tests    parts of `make test`
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
TEST = $(RUN) pytest -q --durations=10
NEWER = $(VENV)/vllm-0.33
# Two parts at a time, so each may have one core: models as small as the tests' gain nothing from more.
# Their environment is there by then: a part that first waited for it would begin behind the short ones.
SIDE_BY_SIDE = OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(MAKE) --jobs=2 --output-sync=target ENV= NEW=
ENV = env
NEW = newer

.PHONY: demo serve docs evidence reference quick test env newer lint unit kernels kernels-compiled rehearsal engine engine-newer
.PHONY: serve-tests soak vllm-tests compatibility gpu-check engine-check clean

demo: env
	@$(VENV)/bin/vllm-orthrus demo

serve: env
	@$(VENV)/bin/vllm-orthrus demo --serve

quick: lint
	+@$(SIDE_BY_SIDE) unit kernels ONLY='-m "not slow"'

# The longest first.
test: lint newer
	+@$(SIDE_BY_SIDE) engine engine-newer kernels rehearsal serve-tests unit

env:
	@$(PYTHON) scripts/make_env.py --folder $(VENV)

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) mypy

unit: $(ENV)
	$(TEST) tests/unit $(ONLY)

kernels: $(ENV)
	$(TEST) tests/kernels $(ONLY)

# What a GPU runs, on a CPU.
rehearsal: $(ENV)
	$(TEST) tests/rehearsal

# Nearly half an hour of one core. The tests of `kernels` do the few that need most.
kernels-compiled: env
	$(RUN) benchmarks.kernel_resources --pinned --write

engine: $(ENV)
	$(TEST) tests/engine

# The newer vLLM has no CPU build yet; its Python runs over the older one's binaries.
newer: env
	@$(VENV)/bin/python scripts/overlay_vllm.py 0.33.0 $(NEWER)

engine-newer: $(NEW)
	PYTHONPATH=$(NEWER) $(TEST) tests/engine tests/rehearsal -m "not slow and not once"

# `serve` is the server itself.
serve-tests: $(ENV)
	$(TEST) tests/serve

MINUTES ?= 5
RATE ?= 2
soak: env
	$(RUN) tests.serve.soak --minutes $(MINUTES) --rate $(RATE)

vllm-tests: newer
	$(VENV)/bin/python scripts/vllm_tests.py
	PYTHONPATH=$(NEWER) $(VENV)/bin/python scripts/vllm_tests.py

# An hour and a quarter of one core, for each vLLM.
compatibility: newer
	rm -f benchmarks/evidence/compatibility-*.json
	$(TEST) tests/engine -m feature --features benchmarks/evidence
	PYTHONPATH=$(NEWER) $(TEST) tests/engine -m feature --features benchmarks/evidence
	$(RUN) tests.compatibility

# Hours of two cores, all together.
FILES ?= all
evidence: newer
	@status=0; $(RUN) benchmarks.renew $(FILES) || status=$$?; $(RUN) benchmarks.figures && exit $$status

reference: env
	$(VENV)/bin/python scripts/reference_pages.py
	$(RUN) benchmarks.figures

docs: env
	$(RUN) mkdocs build --strict

# Needs only PyTorch and Triton, so on a bare image it runs with the Python that has those.
gpu-check:
	$(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON)) -m benchmarks.gpu_check

engine-check:
	$(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON)) -m benchmarks.engine_check

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
