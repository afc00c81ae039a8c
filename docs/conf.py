import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import _results
import _support

_results.build()
_support.build()

project = "gracekit"
author = "The gracekit authors"
copyright = "2026, The gracekit authors"
release = version = importlib.metadata.version("gracekit")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
bibtex_bibfiles = ["references.bib"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = f"gracekit {version}"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True

# The pages build without a network, so names of other projects are not resolved.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|torchao|transformers|PIL|nn|collections|pathlib|types|typing|os|argparse|einops|accelerate|datasets)\..*",
    ),
    # What a data set or a processor must have; described where it is taken.
    (r"py:class", r"gracekit\.recipe\..*\.(Samples|RecordSource|Encoder)"),
    (r"py:.*", r"(Tensor|Module|Path|Any|Callable|Sequence|Iterator|Iterable|Mapping|Self|optional|AOBaseConfig)"),
]

doctest_test_doctest_blocks = "default"
doctest_global_setup = """
import os
import torch
from torch import nn
from gracekit import *
from gracekit.capture import ActivationTap
torch.manual_seed(0)
"""
