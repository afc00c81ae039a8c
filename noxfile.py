"""Sessions a person or CI runs: `python -m nox -s NAME`. Each makes its own environment and installs what it needs, pinned."""

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.reuse_existing_virtualenvs = True
# pip, because uv would resolve torch to the newest CUDA build whatever local wheel there is.
nox.options.default_venv_backend = "virtualenv"

PROJECT = nox.project.load_toml("pyproject.toml")
QUIET = {
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",  # torchao warns of its CUDA libraries on machines without one
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def install(session: nox.Session, group: str, *, package: bool = True) -> None:
    """Install a dependency group of pyproject.toml and, after it, the package itself with nothing resolved anew."""
    session.install(*nox.project.dependency_groups(PROJECT, group))
    if package:
        session.install("--no-deps", "-e", ".")
    session.env.update(QUIET)


@nox.session
def recipe(session: nox.Session) -> None:
    """Train, quantise and answer questions on real images: python -m nox -s recipe -- --seed 1 --output runs/one."""
    install(session, "runtime")
    session.run("python", "-m", "gracekit.recipe", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Every test, on the CPU: python -m nox -s tests -- -k gated_dkd."""
    install(session, "tests")
    session.run("python", "-m", "pytest", *session.posargs)
    if not session.posargs:  # the release that llmcompressor pins reads our files as the newest does
        session.install("--no-deps", "compressed-tensors==0.19.0")
        session.run("python", "-m", "pytest", "tests/test_quant_compressed_tensors_peer.py")


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """The kernels on a CUDA machine, in the environment at hand: CUDA's torch, triton, torchao, pytest, hypothesis."""
    session.env.update(QUIET, PYTHONPATH="src")
    kernels = [
        "tests/test_cuda.py",
        "tests/test_triton_gated_dkd.py",
        "tests/test_bfloat16_cka.py",
        "tests/test_relational_cka.py",
        "tests/test_triton_attention.py",
        "tests/test_triton_int4.py",
        "tests/test_gluon_few.py",
        "tests/test_gluon_int4.py",
        "tests/test_gluon_vector.py",
        "tests/test_triton_lsq.py",
        "tests/test_quant_cuda.py",
        "tests/test_inference_generate.py",
    ]
    session.run("python", "-m", "pytest", *kernels, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    install(session, "lint", package=False)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Strict type check of src."""
    install(session, "types")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """HTML pages with warnings as errors, then every example in them and in the docstrings."""
    install(session, "docs")
    session.run("sphinx-build", "-W", "-n", "-b", "html", "docs", "docs/_build/html")
    session.run("sphinx-build", "-W", "-b", "doctest", "docs", "docs/_build/doctest")


@nox.session
def bench(session: nox.Session) -> None:
    """One benchmark: python -m nox -s bench -- gated_dkd --rows 256."""
    install(session, "bench")
    if not session.posargs:
        session.error("name a benchmark: python -m nox -s bench -- gated_dkd")
    name, *arguments = session.posargs
    session.run("python", f"benchmarks/bench_{name}.py", *arguments)
