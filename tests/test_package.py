"""The package as a whole: import time, laziness, layers, what is in the wheel."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

import invirtuo as iv

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "invirtuo"
LAYERS = [
    {
        *("design", "splits", "preprocess", "batch", "transforms", "nn", "flow", "metrics", "reports"),
        *("checks", "conditions", "errors", "files", "genes", "multimodal", "pseudobulk", "pseudotime"),
        *("settings", "source", "store", "threads", "values", "workers"),
    },
    {"samplers", "datasets", "fit", "windows"},
    {"dataset"},
    {"model"},
    {"generators", "dynamics"},
    {"models"},
    {"bench"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(source: str) -> set[str]:
    """Absolute names that a module imports anywhere, `from a import b` as both a and a.b."""
    names = set()
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def executed(node: ast.AST):
    """Walk all nodes but those for the type checker only: a type may be named from above."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from executed(child)


def faults(module: str, source: str) -> list[str]:
    """What a module, named like "nn.mlp", imports against the rules."""
    parts = module.split(".")
    top, names = parts[0], imported(source)
    own = {name.split(".")[1] for name in names if name.startswith("invirtuo.")} & set(LEVEL)
    found = [f"{module} imports {other}, which lies above" for other in own if LEVEL[other] > LEVEL[top]]
    if top == "models" and len(parts) > 1:
        other = {tuple(name.split(".")[2:3]) for name in names if name.startswith("invirtuo.models.")}
        found += [f"{module} imports the model {name}" for (name,) in other if name != parts[1] and is_module(name)]
    if top in ("nn", "flow") and any(name.split(".")[0] == "anndata" for name in names):
        found.append(f"{module} imports anndata")
    if top in ("metrics", "reports") and own & {"model", "models"}:
        found.append(f"{module} imports a model")
    return found


def is_module(name: str) -> bool:
    return (SOURCE / "models" / f"{name}.py").exists()


def modules() -> list[str]:
    files = [file.relative_to(SOURCE).with_suffix("") for file in SOURCE.rglob("*.py")]
    names = [".".join(file.parts).removesuffix(".__init__") for file in files]
    return sorted(name for name in names if name not in ("__init__", "__main__"))


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    assert module.split(".")[0] in LEVEL, f"{module} has no layer; put it into LAYERS"
    path = SOURCE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert faults(module, file.read_text(encoding="utf-8")) == []


def test_layer_rules_find_faults():
    assert faults("fit", "from invirtuo.model import Model") == ["fit imports model, which lies above"]
    assert faults("fit", "def f():\n    from invirtuo import models") == ["fit imports models, which lies above"]
    assert faults("nn.mlp", "import anndata as ad") == ["nn.mlp imports anndata"]
    assert "metrics.core imports a model" in faults("metrics.core", "import invirtuo.models")
    assert faults("model", "from invirtuo.fit import FitConfig\nimport torch") == []
    assert faults("fit", "if TYPE_CHECKING:\n    from invirtuo.model import Model") == []
    with pytest.raises(AssertionError, match="relative"):
        faults("model", "from .fit import FitConfig")


def test_import_is_quick_and_lazy():
    code = (
        "import sys, time; start = time.perf_counter(); import invirtuo; seconds = time.perf_counter() - start;"
        "heavy = {'lightning', 'pytorch_lightning', 'scanpy', 'matplotlib', 'ray', 'anndata', 'sklearn'};"
        "print(seconds, *heavy & set(sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
        for _ in range(3)
    ]
    assert [run.stdout.split()[1:] for run in runs] == [[], [], []]
    assert median(float(run.stdout.split()[0]) for run in runs) < 0.7


def test_heavy_packages_wait_for_their_use():
    code = (
        "import sys, invirtuo as iv; iv.Design, iv.preprocess, iv.datasets.toy, iv.splits, iv.report;"
        "print(*{'lightning', 'pytorch_lightning', 'scanpy', 'matplotlib', 'ray'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert run.stdout.strip() == ""


def test_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", iv.__version__)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changes
    assert "dynamic" in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_package_data_is_there():
    files = resources.files("invirtuo")
    for name in ("py.typed", "data/kang_ifnb_demo.h5ad", "reports/page.html.j2"):
        assert files.joinpath(name).is_file(), name


def test_constraints_pin_plain_versions():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in pins if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in pins)
    names = {line.split("==")[0].lower().replace("_", "-") for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"], "torchmetrics", "pytorch-lightning"]
    assert {re.split(r"[<>=; \[]", line)[0].lower() for line in wanted} <= names


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = iv.nothing


# ---- pages of the API ------------------------------------------------------------------------------------------------


def documented() -> set[int]:
    """Identities of what docs/api.md names, by module and members."""
    directive = re.compile(r"^\.\. auto(\w+):: (\S+)\n((?:   .*\n)*)", re.MULTILINE)
    found = set()
    for kind, path, options in directive.findall((ROOT / "docs" / "api.md").read_text()):
        if kind != "module":
            found.add(id(pkgutil.resolve_name(path)))
            continue
        module = importlib.import_module(path)
        members = re.search(r":members:([^:]*)", options)
        names = [name.strip() for name in members[1].split(",")] if members and members[1].strip() else module.__all__
        found |= {id(getattr(module, name)) for name in names}
    return found


def test_every_public_name_stands_in_the_pages_of_the_api():
    """What `__all__` of the package and of its public modules names, but for types of arguments and the version."""
    known, modules, missing = documented(), [iv], []
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                modules += [value] if value not in modules and hasattr(value, "__all__") else []
            elif (callable(value) or isinstance(value, dict)) and id(value) not in known:
                missing.append(f"{module.__name__}.{name}")
    assert missing == []


@pytest.mark.parametrize("name", iv.models.MODELS)
def test_every_model_stands_in_the_pages_of_the_models(name):
    pages = [
        page
        for page in [ROOT / "docs" / "models.md", *(ROOT / "docs" / "models").glob("*.md")]
        if f"`{name}`" in page.read_text()
    ]
    assert pages
