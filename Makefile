# Every target creates the environment .venv if it does not exist.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
AUDIO ?= granite_speech/assets/sample.flac

.PHONY: transcribe test test-transformers-4 lint fuzz soak sweep bench hours times rehearse embedded clean

# For example: make transcribe AUDIO=speech.wav MODEL=ibm-granite/granite-speech-3.3-2b
transcribe: .venv/installed
	$(BIN)/granite-speech transcribe "$(AUDIO)" $(if $(MODEL),--model "$(MODEL)")

test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# accelerate() with transformers 4.56.2, which has another layout of attributes, in place of the version that is installed.
test-transformers-4: build/transformers-4/installed
	PYTHONPATH=build/transformers-4 $(BIN)/python -m pytest tests/interop --ignore-glob '*_trainer*' -n auto --maxprocesses 8

build/transformers-4/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --target build/transformers-4 --no-deps transformers==4.56.2 huggingface_hub==0.35.3 \
		tokenizers==0.22.1 requests==2.32.5 urllib3==2.5.0 charset-normalizer==3.4.3 idna==3.10 certifi==2025.8.3
	touch $@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Five thousand damaged sound files; the tests read three hundred.
fuzz: .venv/installed
	$(BIN)/python -m tests.support.fuzz_audio 5000

# Ten thousand requests to an engine: no page lost, and memory that does not grow. The tests send two thousand.
soak: .venv/installed
	$(BIN)/python -m tests.support.soak 10000

# Recordings of six hundred lengths, with speech and without. The tests have forty.
sweep: .venv/installed
	$(BIN)/python -m tests.support.sweep_lengths 600

bench: .venv/installed
	$(BIN)/python -m bench model

# An hour of audio with the bundled checkpoint: words, speed and memory. Needs the synthesizers of `make embedded` the first time.
hours: .venv/installed
	$(BIN)/python -m bench hours

# Times and confidences of words with the bundled checkpoint. Needs the same synthesizers.
times: .venv/installed
	$(BIN)/python -m bench times

# Launches, waits and allocations of the released models, without a GPU.
rehearse: .venv/installed
	$(BIN)/python -m bench rehearse

# Train the bundled checkpoint: about three hours on two cores. An interrupted run resumes when the command is repeated.
embedded: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m granite_speech.training.bundled_checkpoint.recipe build/embedded \
		--dtype bfloat16 --checkpoint granite_speech/assets/embedded --curve bench/results/embedded-training.svg

.venv/installed: setup.py requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements.txt --editable ".[test]"
	touch $@

clean:
	rm -rf build dist .venv *.egg-info
