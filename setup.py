"""Two import packages from two source roots: granite_speech/ and kernels/granite_kernels/.

`kernels/` must not have an __init__.py: transformers imports a package of that name from Hugging Face. As a plain folder ours
loses to it; as a package it would hide or overwrite theirs.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="granite-speech-triton",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "granite_speech/__init__.py").read_text()).group(1),
    description="IBM's Granite Speech with hand-written Triton kernels: speech in, text out, transformers' interface",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["granite_speech*"], exclude=["granite_speech.training.bundled_checkpoint*"]) + find_packages("kernels"),
    package_dir={"granite_kernels": "kernels/granite_kernels"},
    package_data={"granite_speech": ["py.typed", "assets/*", "assets/embedded/*"], "granite_kernels": ["py.typed"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.11,<2.15",  # torchaudio 2.11 cannot be imported with torch 2.15, which is built for a later CUDA
        "torchaudio>=2.11,<2.12",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "safetensors>=0.5",
        "huggingface_hub>=0.30",
        "tokenizers>=0.21",
        "jinja2>=3.1",
        "av>=18.1,<19",  # FFmpeg inside its wheels: decodes recordings
        "tqdm>=4.60",
    ],
    extras_require={
        "vad": ["silero-vad>=6"],  # segmentation="silero"
        "plot": ["matplotlib>=3.9"],  # `--plot` and `plot_words`
        "train": ["jiwer>=4", "matplotlib>=3.9"],  # `finetune --validation`; the plot of `make embedded`
        "test": [
            "transformers==5.23.0",
            "numpy<2.4",  # with 2.4, Triton 3.6's interpreter cannot loop over a runtime range
            "peft>=0.21",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "jiwer>=4",
            "matplotlib>=3.9",
            "pysubs2==1.8.1",  # it, srt and webvtt-py read subtitles back
            "ruff>=0.15",
            "soundfile>=0.12",  # writes clips: the recipe of the bundled checkpoint, bench words, and tests
            "srt==3.5.3",
            "webvtt-py==0.6.0",
            "wheel>=0.40",
        ],
    },
    entry_points={"console_scripts": ["granite-speech=granite_speech.cli:command"]},
    classifiers=["Programming Language :: Python :: 3", "License :: OSI Approved :: Apache Software License"],
)
