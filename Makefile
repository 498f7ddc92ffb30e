# One environment, .venv, made by whichever target comes first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
AUDIO ?= granite_speech/assets/jfk.flac
RANDOM_MODEL := build/random-checkpoint

.PHONY: transcribe test lint bench clean

# Text of a sound file: make transcribe AUDIO=speech.wav MODEL=ibm-granite/granite-speech-3.3-2b
ifdef MODEL
transcribe: .venv/installed
else
MODEL := $(RANDOM_MODEL)
transcribe: .venv/installed $(RANDOM_MODEL)/config.json
	@echo "No MODEL given: these words come from a small model with random weights, and mean nothing." >&2
endif
	$(BIN)/granite-speech transcribe "$(AUDIO)" --model "$(MODEL)"

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python -m bench model

$(RANDOM_MODEL)/config.json: .venv/installed tests/random_checkpoint.py tests/small_tokenizer.py
	PYTHONPATH=. $(BIN)/python -m tests.random_checkpoint $(RANDOM_MODEL)

.venv/installed: setup.py requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements.txt --editable ".[test]"
	touch $@

clean:
	rm -rf build dist .venv *.egg-info
