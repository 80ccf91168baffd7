"""The package as a whole: import time, laziness, former names, what is in the wheel, pages of the API."""

from __future__ import annotations

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
import yaml

import invirtuo as iv
from invirtuo import _former

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "invirtuo"


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
    assert "## [0.2.0]" in changes
    assert "dynamic" in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_package_data_is_there():
    files = resources.files("invirtuo")
    for name in (
        "py.typed",
        "data/kang_ifnb_demo.h5ad",
        "data/kang-primeflow/weights.safetensors",
        "reports/page.html.j2",
    ):
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


def test_the_conda_recipe_says_what_the_project_says():
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    about, needed = project["project"], recipe["requirements"]
    named = {"matplotlib": "matplotlib-base", "pooch[progress]": "pooch", "torch": "pytorch"}

    wanted = {f"python {about['requires-python']}", "tqdm"}
    for line in about["dependencies"]:
        name, bounds = re.fullmatch(r"([\w.\[\]-]+?)([<>=].*)", line).groups()
        wanted.add(f"{named.get(name, name)} {bounds}")
    assert set(needed["run"]) == wanted
    builder = project["build-system"]["requires"][0].replace(">", " >", 1)
    assert builder in needed["host"] and needed["run"][0] in needed["host"]
    assert (recipe["package"]["version"], recipe["about"]["license"]) == (iv.__version__, about["license"])
    entry = f"invirtuo = {about['scripts']['invirtuo']}"
    assert recipe["build"]["python"]["entry_points"] == [entry] and recipe["about"]["summary"] == about["description"]


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = iv.nothing


# ---- pages of the API ------------------------------------------------------------------------------------------------


def documented() -> set[int]:
    """Identities of what has a page: entries of the tables with a toctree in docs/api/*.md."""
    table = re.compile(r"^\.\. autosummary::\n   :toctree: ../generated\n((?:   .*\n|\n)*)", re.MULTILINE)
    found = set()
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for entries in table.findall(page.read_text(encoding="utf-8")):
            names = [line.strip() for line in entries.splitlines() if line.strip() and ":" not in line]
            found |= {id(called(name)) for name in names}
    return found


def called(name: str) -> object:
    """What ``iv.name`` is; of names that lie deeper, what their module holds."""
    try:
        return pkgutil.resolve_name(f"invirtuo:{name}")
    except AttributeError:
        module, _, attribute = f"invirtuo.{name}".rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def test_every_public_name_has_a_page_in_the_api():
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


def test_every_room_of_the_api_is_listed():
    entry = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rooms = {f"api/{page.stem}" for page in (ROOT / "docs" / "api").glob("*.md")}
    assert rooms == set(re.findall(r"^(api/\S+)$", entry, re.MULTILINE))


@pytest.mark.parametrize("name", iv.models.MODELS)
def test_every_model_stands_in_the_pages_of_the_models(name):
    pages = [
        page
        for page in [ROOT / "docs" / "models.md", *(ROOT / "docs" / "models").glob("*.md")]
        if f"`{name}`" in page.read_text()
    ]
    assert pages


# ---- former names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*_former.MODULES, *_former.PACKAGES])
def test_modules_are_found_by_their_former_names(name):
    """With a warning that says where they are; nothing is loaded twice."""
    package = name.split(".")[0]
    for former in (name, package) if package in _former.PACKAGES else (name,):
        sys.modules.pop(f"invirtuo.{former}", None)
    with pytest.warns(DeprecationWarning) as said:
        module = importlib.import_module(f"invirtuo.{name}")
    assert str(said[-1].message).startswith(f"invirtuo.{name} is now invirtuo.")
    if name in _former.MODULES:
        assert module is importlib.import_module(f"invirtuo.{_former.MODULES[name]}")
        assert module.__spec__.name == f"invirtuo.{_former.MODULES[name]}"
    else:
        assert hasattr(module, "__all__") and not hasattr(module, "no_such_name")


def test_former_packages_are_attributes_too():
    with pytest.warns(DeprecationWarning, match="invirtuo.model is now invirtuo.verbs"):
        vars(iv).pop("model", None)
        sys.modules.pop("invirtuo.model", None)
        assert iv.model.Model is iv.Model


def test_a_report_is_made_by_its_name_even_if_the_former_module_is_imported():
    code = "import invirtuo as iv, invirtuo.report; assert callable(iv.report); print(iv.report.page.report.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert run.stdout.strip() == "report"
