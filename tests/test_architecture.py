"""The house rules hold in this repository, and each notices a planted violation."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import architecture_rules as rules
from tests.architecture_rules import SOURCE, Rule, Texts, texts

PYTHON = SOURCE | texts("tests/**/*.py", "scripts/**/*.py", "benchmarks/**/*.py", "examples/**/*.py")
DOCUMENTS = texts("*.md", "docs/**/*.md")
OTHERS = texts("Makefile", "*.toml", ".*.yaml", ".ci/*", "benchmarks/**/*.json", "src/**/*.json")
SUBJECTS: dict[Rule, Texts] = {
    rules.rows: SOURCE,
    rules.folders: SOURCE,
    rules.bans: SOURCE,
    rules.excepts: SOURCE,
    rules.docstrings: SOURCE,
    rules.sizes: PYTHON,
    rules.names: DOCUMENTS,
    rules.commands: DOCUMENTS,
    rules.examples: DOCUMENTS,
    rules.ledger: DOCUMENTS,
    rules.places: PYTHON | DOCUMENTS | OTHERS,
}


@pytest.mark.parametrize("rule", SUBJECTS)
def test_repository_keeps_the_rule(rule: Rule) -> None:
    assert SUBJECTS[rule]
    complaints = rule(SUBJECTS[rule])
    assert not complaints, "\n".join(complaints)


def test_documents_are_there_and_say_things_that_can_be_checked() -> None:
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"} < DOCUMENTS.keys()
    assert sum(path.startswith("docs/adr/") for path in DOCUMENTS) >= 9
    assert len(re.findall(r"\.py::test_", DOCUMENTS["ARCHITECTURE.md"])) > 20
    assert {"python", "sh"} <= {language for language, _ in rules.fenced(DOCUMENTS["README.md"])}


# The alarm itself.

OP, HERE = "src/isobatch/kernels/x/cpu.py", "src/isobatch/engine/x.py"
IMPORTS = [
    (rules.rows, "kernels/x.py", "from isobatch.ops import Ops", "row 1 imports ops of row 2"),
    (rules.rows, "ops/x.py", "import isobatch.engine.engine", "row 2 imports engine of row 4"),
    (rules.rows, "engine/x.py", "def f():\n    from isobatch.audit import experiment", "x.py:2: row 4"),
    (rules.rows, "models/x.py", "from isobatch import LLM", "row 3 imports __init__ of row 8"),
    (rules.rows, "env.py", "from isobatch import bits", "row 0 imports bits of row 0"),
    (rules.rows, "engine/x.py", "from . import engine", "(a relative import) is in no row"),
    (rules.rows, "engine/x.py", "from isobatch.server import app", "row 4 imports server of row 5"),
    (rules.rows, "somewhere/x.py", "from isobatch import errors", "somewhere or errors is in no row"),
    (rules.folders, "kernels/rotary/x.py", "from isobatch.kernels.linear import cpu", "folder of linear"),
    (rules.folders, "kernels/cpu/x.py", "import isobatch.kernels.attention.cpu", "folder of attention"),
    (rules.folders, "kernels/embedding/cpu.py", "", "kernels/embedding/cpu.py need not look into linear"),
]
BANNED = [
    (HERE, "import os\nos.environ['A']", "only env.py"),
    (HERE, "from os import getenv as g\ng('A')", "only env.py"),
    (HERE, "import torch\ntorch.manual_seed(0)", "torch's generator"),
    (HERE, "import torch\ntorch.randn(3)", "torch's generator"),
    (HERE, "import random\nrandom.shuffle([])", "Python's generator"),
    (HERE, "from random import choice\nchoice([1])", "Python's generator"),
    (HERE, "import numpy as np\nnp.random.rand()", "NumPy's generator"),
    (HERE, "import secrets\nsecrets.randbits(3)", "chance enters as a seed"),
    (HERE, "import torch\ntorch.set_flush_denormal(True)", "a setting of the whole process"),
    (HERE, "import torch\ntorch.backends.mkldnn.enabled = False", "a setting of the whole process"),
    (HERE, "import numba\nnumba.set_num_threads(1)", "a setting of the whole process"),
    (HERE, "import triton\n@triton.autotune([])\ndef f(): ...", "a stopwatch"),
    (HERE, "import triton.language as tl\ntl.atomic_add(p, x)", "who comes first"),
    (HERE, "from time import time as t\nt()", "the time"),
    (HERE, "import torch\ntorch.softmax(x, -1)", "a library's own bits"),
    (HERE, "import torch\ntorch.argmax(x)", "breaks ties its own way"),
    (HERE, "import torch\ntorch.nn.functional.linear(x, w)", "a library sums"),
    (HERE, "y = x @ w", "a library sums"),
    (HERE, "print(1)", "only the command line prints"),
    (HERE, "hash('a')", "another in each process"),
    (HERE, "import importlib\nimportlib.import_module('x')", "no rule sees"),
    (OP, "import math\nmath.exp(x)", "libm"),
    (OP, "import numpy as np\nf = np.sin", "libm"),
    (OP, "import numpy as np\nnp.log(x) + np.power(x, y) + np.cos(x) + np.exp(x)", "numpy.power: libm"),
    (OP, "import numpy as np\nnp.sum(x)", "a library sums"),
    (OP, "njit(fastmath=True)", "fastmath"),
]
BAD_SOURCE = [
    (rules.excepts, "try: f()\nexcept Exception: pass", "does not raise"),
    (rules.excepts, "try: f()\nexcept (KeyError, Exception): g()", "does not raise"),
    (rules.excepts, "try: f()\nexcept: g()", "does not raise"),
    (rules.docstrings, "", "no docstring"),
    (rules.docstrings, '"X."\ndef f(): ...', "f has no docstring"),
    (rules.docstrings, '"X."\nclass A:\n "A."\n def f(self): ...', "A.f has no docstring"),
    (rules.docstrings, '"X."\nclass Ops:\n "A."\n def f(self):\n  "F."\n  self._run()', "depends on"),
    (rules.sizes, "\n" * 401, "401 lines, more than 400"),
]
BAD_DOCUMENTS = [
    (rules.names, "See `kernels/nothing/cpu.py`.", "kernels/nothing/cpu.py"),
    (rules.names, "See `docs/nothing/`.", "docs/nothing/"),
    (rules.names, "See `nothing.py`.", "nothing.py"),
    (rules.names, "See `docs/README.md`.", "docs/README.md"),
    (rules.names, "See `tests/test_golden.py::test_nothing`.", "test_nothing"),
    (rules.names, "See `test_golden.py::test_nothing`.", "test_nothing"),
    (rules.names, "See `Ops.nothing`.", "Ops.nothing"),
    (rules.commands, "Run `make nothing`.", "there is no nothing"),
    (rules.commands, "```sh\n$ make demo nothing A=b  # x\n```", "there is no nothing"),
    (rules.commands, "Run `isobatch bake`.", "there is no bake"),
    (rules.commands, "```\npython -m isobatch generate demo --nothing=1\n```", "there is no --nothing"),
    (rules.examples, "```python\nfrom isobatch import Nothing\n```", "there is no Nothing"),
    (rules.examples, "```python\nSamplingParams(nothing=1)\n```", "there is no nothing"),
    (rules.examples, "```python\nLLM('x', nothing=1)\n```", "there is no nothing"),
    (rules.ledger, "## The variance ledger\n| a | b | `env.py` | no test |\n", "without a file or a test"),
    (rules.ledger, "## The variance ledger\n| a | b | c | `x.py::test_y` |\n", "without a file or a test"),
    (rules.places, "See " + "/".join(("", "work", "main")) + ".", "A.md:1: "),
]
PLANTED: list[tuple[Rule, Texts, str]] = [
    *((rule, {**SOURCE, f"src/isobatch/{path}": text}, said) for rule, path, text, said in IMPORTS),
    *((rules.bans, {path: text}, said) for path, text, said in BANNED),
    *((rule, {HERE: text}, said) for rule, text, said in BAD_SOURCE),
    *((rule, {"A.md": text}, said) for rule, text, said in BAD_DOCUMENTS),
    (rules.sizes, {"tests/x.py": "\n" * 601}, "601 lines, more than 600"),
]


@pytest.mark.parametrize(("rule", "subject", "said"), PLANTED)
def test_rule_catches_a_planted_violation(rule: Rule, subject: Texts, said: str) -> None:
    complaints = rule(subject)
    assert any(said in complaint for complaint in complaints), complaints


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _ in PLANTED} == SUBJECTS.keys()


@pytest.mark.parametrize(
    "text",
    [
        "import random\nrandom.Random(1).shuffle([])",
        "import torch\ntorch.Generator().manual_seed(1)",
        "import math\nmath.log2(math.e), math.log(2.0), math.sqrt(x)",
        "import numpy as np\nnp.sqrt(x), np.float32(1)",
        "console.print(1)",
        "try: f()\nexcept Exception as error: raise ValueError from error",
    ],
)
def test_rules_let_pass_what_is_fine(text: str) -> None:
    assert rules.bans({OP: text}) + rules.excepts({OP: text}) == []


# The door.

DOOR = {
    "LLM",
    "Completion",
    "EngineConfig",
    "Receipt",
    "Reply",
    "SamplingParams",
    "TokenLogProbs",
    "Verdict",
    "__version__",
    "errors",
    "receipt_from_json",
}


def door_complaints(exported: list[str], resolve: Callable[[str], object]) -> list[str]:
    """What is exported is what was decided on, and every name leads somewhere."""
    complaints = [f"{name} was not decided on" for name in exported if name not in DOOR]
    complaints += [f"{name} is missing" for name in sorted(DOOR.difference(exported))]
    for name in exported:
        try:
            resolve(name)
        except AttributeError:
            complaints.append(f"{name} leads nowhere")
    return complaints


def test_door_is_what_was_decided_on() -> None:
    import isobatch

    def resolve(name: str) -> object:
        return getattr(isobatch, name)

    assert door_complaints(isobatch.__all__, resolve) == []
    planted = [*isobatch.__all__[1:], "Nothing"]
    assert door_complaints(planted, resolve) == [
        "Nothing was not decided on",
        f"{isobatch.__all__[0]} is missing",
        "Nothing leads nowhere",
    ]


@pytest.mark.parametrize(("statement", "heavy"), [("import isobatch", False), ("import isobatch.bits", True)])
def test_door_opens_at_once(statement: str, heavy: bool) -> None:
    program = f"import sys; {statement}; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(heavy)
