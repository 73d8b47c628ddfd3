"""The house rules as functions from texts to complaints. Nothing of the package is imported, only parsed.

`tests/test_architecture.py` holds them against this repository, and each against planted violations.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
Texts = Mapping[str, str]
"""File contents by path from the root of the repository."""
Rule = Callable[[Texts], list[str]]


def texts(*patterns: str) -> dict[str, str]:
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(found)}


SOURCE = texts("src/**/*.py")


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def inside(path: str) -> str:
    """The path from the package on: kernels/linear/cpu.py."""
    return path.removeprefix("src/isobatch/")


def _imports(text: str, modules: frozenset[str]) -> Iterator[tuple[int, PurePosixPath]]:
    """(line, path from the package on) of each module of ours that a module imports, at any depth."""
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.level:
                yield node.lineno, PurePosixPath("(a relative import).py")
        else:
            continue
        for parts in (name.split(".") for name in names):
            if parts[0] == "isobatch":
                # `from package import module` looks like `from module import name`: longer paths first.
                stems = ["/".join(parts[1:end]) for end in range(len(parts), 0, -1)]
                files = [file for stem in stems for file in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/"))]
                known = (file for file in files if file in modules)
                yield node.lineno, PurePosixPath(next(known, files[0]))


# Rows.

ROWS = dict.fromkeys(("errors", "config", "env", "bits", "_version"), 0)
ROWS |= {"kernels": 1, "ops": 2, "models": 3, "engine": 4, "server": 5}
ROWS |= {"audit": 6, "cli": 7, "__init__": 8, "__main__": 8}
FOR_EVERYONE = {"errors", "_version"}


def rows(sources: Texts) -> list[str]:
    """A module imports from rows below its own, or from its own package."""
    modules = frozenset(map(inside, sources))
    complaints = []
    for path, text in sources.items():
        mine = PurePosixPath(inside(path)).parts[0].removesuffix(".py")
        for line, target in _imports(text, modules):
            theirs = target.parts[0].removesuffix(".py")
            if mine not in ROWS or theirs not in ROWS:
                complaints.append(f"{path}:{line}: {mine} or {theirs} is in no row")
            elif mine != theirs and ROWS[theirs] >= ROWS[mine] and theirs not in FOR_EVERYONE:
                complaints.append(f"{path}:{line}: row {ROWS[mine]} imports {theirs} of row {ROWS[theirs]}")
    return complaints


# Where an op's folder is seen from outside it, and why. An entry that nothing needs is a complaint too.
NEIGHBOURS = {
    ("kernels/catalogue.py", "*"),  # lists all records
    ("kernels/gpu/catalogue.py", "*"),  # likewise, of the GPU
    ("kernels/cpu/layout.py", "linear"),  # the layout of weights is linear's
    ("kernels/cpu/layout.py", "attention"),  # and that of caches attention's
    ("kernels/gpu/layout.py", "attention"),  # likewise on the GPU
    ("kernels/gpu/layout.py", "moe"),  # and the widths that experts may have
    ("kernels/moe/cpu.py", "linear"),  # an expert's products are linear's
    ("kernels/moe/cpu.py", "activation"),
    ("kernels/linear/triton.py", "activation"),  # a tile of gates and ups joins them before it stores them
    ("kernels/gated/gpu.py", "linear"),  # the first half of an MLP is a product
    ("kernels/gated/gpu.py", "activation"),  # and what joins its halves
    ("kernels/gated/gpu_record.py", "linear"),
    ("kernels/gated/gpu_record.py", "activation"),
    ("kernels/gated/stock.py", "linear"),
    ("kernels/gated/stock.py", "activation"),
    ("kernels/qkv/gpu_record.py", "rms_norm"),  # the fused kernel is certified against the separate ones
    ("kernels/qkv/gpu_record.py", "rotary"),
    ("kernels/qkv/stock.py", "rms_norm"),  # torch's chain is torch's ops
    ("kernels/qkv/stock.py", "rotary"),
    ("kernels/cpu/random_weights.py", "sampling"),  # the one generator of random words
    ("kernels/gpu/random_weights.py", "sampling"),
    ("kernels/embedding/cpu.py", "linear"),  # tied weights are stored once, in linear's panels
}


def folders(sources: Texts) -> list[str]:
    """An op's folder is seen from inside it and from NEIGHBOURS, and by no other kernel module."""
    modules = frozenset(map(inside, sources))
    ops = {path.split("/")[1] for path in modules if re.fullmatch(r"kernels/\w+/record\.py", path)}
    complaints, needed = [], set()
    for path, text in sources.items():
        here = inside(path)
        for line, target in _imports(text, modules):
            if not here.startswith("kernels/") or target.parts[0] != "kernels":
                continue
            op = target.parts[1]
            if op not in ops or op == here.split("/")[1]:
                continue
            excuse = {(here, "*"), (here, op)} & NEIGHBOURS
            needed |= excuse
            if not excuse:
                complaints.append(f"{path}:{line}: looks into the folder of {op}")
    return complaints + [f"{path} need not look into {op}" for path, op in sorted(NEIGHBOURS - needed)]


# Banned names.


@dataclass(frozen=True)
class Ban:
    """Names that may not be used.

    Args:
        names: matches full names, whatever they were imported as.
        why: the complaint.
        within: matches paths from the package on where it holds.
        spared: matches those where it does not.
        constants: whether a call on constants alone is allowed.
    """

    names: str
    why: str
    within: str = ".*"
    spared: str = "nowhere"
    constants: bool = False


NUMBERS = "(kernels|ops|models|engine)/.*"
OURS = f"(?!.*/stock(_gpu)?.py){NUMBERS}"
LIBM = "(exp|log)[12]?[0p]?|expm1|pow|power|float_power|(arc|a)?(sin|cos|tan)h?2?|erfc?|l?gamma|cbrt"
SUMS = "sum|mean|average|dot|inner|matmul|b?mm|mv|addmm|baddbmm|einsum|cumsum|var|std|norm|linalg.*|trapezoid"
BANS = (
    Ban(r"os\.(environb?|getenvb?|putenv).*", "only env.py reads the environment", spared="env.py"),
    Ban(
        r"torch\.(manual_seed|(initial_)?seed|set_rng_state|rand\w*|normal|bernoulli|multinomial|poisson)",
        "torch's generator is everybody's",
        spared="audit/relations.py",  # fills a matrix that keeps a thread busy
    ),
    Ban(r"random\.(?!Random$).*", "Python's generator is everybody's"),
    Ban(r"numpy\.random.*", "NumPy's generator is everybody's"),
    Ban(r"(secrets|uuid)\..*|os\.urandom", "chance enters as a seed", spared="engine/seeds.py"),
    Ban(r"torch\.(set_\w+|use_deterministic_algorithms|backends.*)", "a setting of the whole process"),
    Ban(r"numba\.set_num_threads", "a setting of the whole process", spared="kernels/cpu/jit.py"),
    Ban(r"triton\.(.*\.)?autotune", "a tile picked by a stopwatch"),
    Ban(
        r"triton\.language\.atomic_\w+",
        "who comes first is added first",
        spared="kernels/sampling/triton.py",  # takes places in a list that is searched whole, in no order
    ),
    Ban(r"(time|datetime)\..*", "no number may depend on the time", within=NUMBERS),
    Ban(rf"(math|numpy)\.({LIBM})", "libm's last bit is the machine's", within=OURS, constants=True),
    Ban(rf"(torch|numpy)\.({SUMS})", "a library sums in its own order", within=OURS),
    Ban(r"torch\.(nn|special)\..*", "a library sums in its own order", within=OURS),
    Ban(rf"torch\.(softmax|log_softmax|logsumexp|sigmoid|{LIBM})", "a library's own bits", within=OURS),
    Ban(r"torch\.(sort|argsort|topk|argmax|argmin)", "a library breaks ties its own way", within=OURS),
    Ban(r"print", "only the command line prints", spared="cli/.*"),
    Ban(r"hash", "Python's hash of a string is another in each process"),
    Ban(r"importlib\.import_module|__import__", "an import that no rule sees", spared="__init__.py"),
)


def _aliases(tree: ast.Module) -> dict[str, str]:
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return known


def _dotted(node: ast.AST, aliases: Mapping[str, str]) -> str | None:
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, aliases)
        return None if base is None else f"{base}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else None


def _called_on_constants(tree: ast.Module) -> set[int]:
    def is_constant(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) or _dotted(node, {}) in ("math.e", "math.pi")

    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    return {id(call.func) for call in calls if all(map(is_constant, call.args))}


def bans(sources: Texts) -> list[str]:
    """No name that hides a dependence on something that is not the request."""
    complaints = []
    for path, text in sources.items():
        tree, here = _parse(text), inside(path)
        aliases, constants = _aliases(tree), _called_on_constants(tree)
        held = [ban for ban in BANS if re.fullmatch(ban.within, here) and not re.fullmatch(ban.spared, here)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Name):
                name = _dotted(node, aliases) or ""
                complaints += [
                    f"{path}:{node.lineno}: {name}: {ban.why}"
                    for ban in held
                    if re.fullmatch(ban.names, name) and not (ban.constants and id(node) in constants)
                ]
            elif isinstance(node, ast.keyword) and node.arg == "fastmath":
                complaints.append(f"{path}:{node.value.lineno}: fastmath lets the compiler reorder sums")
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
                complaints.append(f"{path}:{node.lineno}: @: a library sums in its own order")
    return complaints


def excepts(sources: Texts) -> list[str]:
    """Outside the command line, who catches everything ends in `raise`: nothing is swallowed."""
    broad = ("Exception", "BaseException")
    return [
        f"{path}:{node.lineno}: a broad except that does not raise"
        for path, text in sources.items()
        if not inside(path).startswith("cli/")
        for node in ast.walk(_parse(text))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or any(_dotted(part, {}) in broad for part in ast.walk(node.type)))
        and not isinstance(node.body[-1], ast.Raise)
    ]


# Size and docstrings.

LONGEST, LONGEST_SOURCE = 600, 400


def sizes(sources: Texts) -> list[str]:
    """No file is too long to read."""
    complaints = []
    for path, text in sources.items():
        lines, most = text.count("\n"), LONGEST_SOURCE if path.startswith("src/") else LONGEST
        if lines > most:
            complaints.append(f"{path}: {lines} lines, more than {most}")
    return complaints


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def docstrings(sources: Texts) -> list[str]:
    """Whatever is public says what it is; an op also says what its result depends on."""
    complaints = []
    for path, text in sources.items():
        tree = _parse(text)
        if not ast.get_docstring(tree):
            complaints.append(f"{path}: no docstring")
        for name, node in _public(tree.body):
            said = ast.get_docstring(node) or ""
            computes = name.startswith("Ops.") and "self._run(" in ast.unparse(node)
            if not said:
                complaints.append(f"{path}:{node.lineno}: {name} has no docstring")
            elif computes and not ("Args:" in said and "Determinism:" in said):
                complaints.append(f"{path}:{node.lineno}: {name} does not say what its result depends on")
    return complaints


# Documents.

GENERATED = {"benchmarks/results/cpu.json"}  # written by `make bench`


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, content) of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _spans(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


@cache
def _members() -> dict[str, set[str]]:
    """Names defined in each class of the package, those of its bases included."""
    members: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for text in SOURCE.values():
        for node in ast.walk(_parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                fields = {ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)}
                members.setdefault(node.name, set()).update(methods | fields)
                bases.setdefault(node.name, []).extend(map(ast.unparse, node.bases))

    def inherited(name: str) -> set[str]:
        return members[name].union(*(inherited(base) for base in bases[name] if base in members))

    return {name: inherited(name) for name in members}


def _tests(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    tree = _parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    # A state machine's tests are assigned: TestX = X.TestCase.
    return names | {ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)}


def _exists(name: str) -> bool:
    # A bare name may be that of any module, such as the record.py that every op has.
    patterns = [
        name.rstrip("/"),
        f"src/isobatch/{name.rstrip('/')}",
        *([] if "/" in name else [f"src/**/{name}"]),
    ]
    return name in GENERATED or any(next(ROOT.glob(pattern), None) for pattern in patterns)


def names(documents: Texts) -> list[str]:
    """Files, tests and attributes that a document names exist."""
    members, complaints = _members(), []
    for document, text in documents.items():
        for span in _spans(text):
            fine = True
            if re.fullmatch(r"[\w.*/-]+(\.(py|md|json|toml|yaml)|/)|Makefile|\.ci/run", span):
                fine = _exists(span)
            elif test := re.fullmatch(r"(\S+\.py)::(\w+)", span):
                fine = test[2] in _tests(ROOT / test[1])
            elif attribute := re.fullmatch(r"([A-Z][A-Za-z]+)\.([a-z]\w*)", span):
                fine = attribute[2] in members.get(attribute[1], ())
            if not fine:
                complaints.append(f"{document}: there is no {span}")
    return complaints


@cache
def _commands() -> dict[str, set[str]]:
    """Subcommands of isobatch, with their options."""
    table = re.search(
        r"^_COMMANDS.*?= (\{.*?\})$", SOURCE["src/isobatch/cli/main.py"], flags=re.MULTILINE | re.DOTALL
    )
    assert table is not None
    options = {}
    for name in re.findall(r'"(\w+)":', table[1]):
        text = SOURCE[f"src/isobatch/cli/{name}.py"]
        if "add_setting_options(" in text:
            text += SOURCE["src/isobatch/cli/model.py"]
        options[name] = {"--help", *re.findall(r'"(--[a-z-]+)"', text)}
    options["generate"] |= {f"--{field.replace('_', '-')}" for field in _members()["SamplingParams"]}
    return options


def commands(documents: Texts) -> list[str]:
    """Commands that a document gives exist, down to their options."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    known, complaints = _commands(), []
    for document, text in documents.items():
        blocks = "".join(block for language, block in fenced(text) if language != "python")
        for line in (*blocks.splitlines(), *_spans(text)):
            words = re.sub(r"^(\$ )?(\S*python -m |\.venv/bin/)?", "", line.split(" #")[0]).split()
            wrong: list[str] = []
            if words[:1] == ["make"]:
                wrong = [word for word in words[1:] if "=" not in word and word not in targets]
            elif words[:1] == ["isobatch"] and len(words) > 1 and words[1] not in known:
                wrong = words[1:2]
            elif words[:1] == ["isobatch"] and len(words) > 1:
                given = [word.split("=")[0] for word in words if word.startswith("--")]
                wrong = [option for option in given if option not in known[words[1]]]
            complaints += [f"{document}: {line}: there is no {word}" for word in wrong]
    return complaints


def examples(documents: Texts) -> list[str]:
    """Python in a document compiles, imports public names, and passes parameters that exist."""
    door = re.search(r"^__all__ = (\[.*?\])", SOURCE["src/isobatch/__init__.py"], re.MULTILINE | re.DOTALL)
    assert door is not None
    exported = set(ast.literal_eval(door[1]))
    members, complaints = _members(), []
    parameters = {
        "SamplingParams": members["SamplingParams"],
        "LLM": members["EngineConfig"] | {"config", "progress"},
    }
    for document, text in documents.items():
        for node in (n for kind, code in fenced(text) if kind == "python" for n in ast.walk(_parse(code))):
            wrong: set[str] = set()
            if isinstance(node, ast.ImportFrom) and node.module == "isobatch":
                wrong = {alias.name for alias in node.names} - exported
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                given = {keyword.arg or "" for keyword in node.keywords}
                wrong = given - parameters.get(node.func.id, given)
            complaints += [f"{document}: there is no {name}" for name in sorted(wrong)]
    return complaints


def ledger(documents: Texts) -> list[str]:
    """Each row of the variance ledger names a file that excludes the cause, and a test that catches it."""
    complaints = []
    for document, text in documents.items():
        section = text.partition("## The variance ledger")[2].partition("\n## ")[0]
        for row in re.findall(r"^\|(?! *Cause|-).*\|$", section, flags=re.MULTILINE):
            *_, where, caught = row.strip("|").split("|")
            if not re.search(r"`[\w/.]+\.(py|md|json)`|`Makefile`", where) or ".py::test_" not in caught:
                complaints.append(f"{document}: without a file or a test: {row}")
    return complaints


def places(everything: Texts) -> list[str]:
    """Nothing says where on somebody's machine it was written."""
    own = re.compile(r"(?<![\w.])/(work|root|Users|home/\w+)/")
    return [
        f"{path}:{number}: {found[0]}"
        for path, text in everything.items()
        for number, line in enumerate(text.splitlines(), 1)
        if (found := own.search(line))
    ]
