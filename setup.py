"""Package metadata. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="sparse_lm",
    version="0.1.0",
    description="Sparse expert language models in JAX and Flax: routing, dispatch, sharding, and numbers one can trust",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url="https://github.com/sparse-lm/sparse_lm",
    python_requires=">=3.11",
    packages=find_packages(include=["sparse_lm", "sparse_lm.*"]),
    package_data={"sparse_lm": ["py.typed"]},
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.90",
        "flax>=0.12.7",
        "grain>=0.2.16",
        "jax>=0.10.0",
        "jaxtyping>=0.3.2",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.0",
        "scipy>=1.13",
        "tensorboardX>=2.6.2",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "cuda12": ["jax[cuda12]"],  # for drivers before 580
        "tpu": ["jax[tpu]"],
        "tpu-plan": ["jax[tpu]"],  # the compiler alone, on a host without a TPU: a wheel of 213 MB, 684 MB on disk
        "gpu-plan": ["triton>=3.5; platform_system == 'Linux'"],  # a compiler, for slow tests: 1 GB on disk
        "ray": ["ray>=2.50"],
        "dev": [
            "beartype>=0.18",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "jax[tpu]",  # libtpu: tests compile for a TPU that is not there
            "jupytext>=1.16",
            "nbclient>=0.10",
            "pre-commit>=3.7",
            "pyright>=1.1.390",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "ray>=2.50",
            "ruff>=0.9",
        ],
    },
)
