"""`import datamerge as dm`: its public names, and an import that loads nothing until a name is used."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import datamerge as dm
from datamerge.packages import OURS, Unavailable, load
from tests.support.paths import ROOT

FUNCTIONS = (
    "attack",
    "combine",
    "convert",
    "cross_entropy",
    "diff",
    "encode_exact",
    "evaluate",
    "evaluate_all",
    "evaluate_captions",
    "evaluate_embedding",
    "evaluate_vqa",
    "evaluate_zero_shot",
    "export",
    "export_encoder",
    "inspect",
    "inspect_source",
    "load_encoder",
    "load_head",
    "merge",
    "open_artifact",
    "open_source",
    "preview",
    "remerge",
    "save_encoder",
    "squared_error",
    "train",
    "verify",
)
SETTINGS = (
    "APGD",
    "CaptionsConfig",
    "EmbeddingConfig",
    "EvaluateConfig",
    "MergeConfig",
    "PGD",
    "Remerge",
    "TrainConfig",
    "VqaConfig",
    "ZeroShotConfig",
)
RESULTS = (
    "ArmResult",
    "Attacked",
    "Difference",
    "MergeResult",
    "Report",
    "Results",
    "RunSummary",
)
ERRORS = (
    "ConfigError",
    "CorruptShard",
    "DatamergeError",
    "NonFiniteGradient",
    "NotAnArtifact",
    "NotFiniteRun",
    "SchemaError",
    "SourceError",
    "Stopped",
    "UnknownVersion",
    "UserError",
)
OTHER_CLASSES = (
    "ArraySpec",
    "Artifact",
    "ArtifactWriter",
    "Cache",
    "Commit",
    "Encoder",
    "ExactMoments",
    "Head",
    "Layout",
    "Location",
    "Manifest",
    "PixelLength",
    "Record",
    "Reject",
    "Source",
)
NAMES = [*FUNCTIONS, *SETTINGS, *RESULTS, *ERRORS, *OTHER_CLASSES]


def test_these_are_the_public_names() -> None:
    assert sorted(dm.__all__) == sorted([*NAMES, "__version__"])
    assert set(dm.__all__) <= set(dir(dm))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists_and_has_a_docstring(name: str) -> None:
    found = getattr(dm, name)
    assert isinstance(found, type) is (name[0].isupper())
    assert (found.__doc__ or "").strip()
    assert getattr(dm, name) is found


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_datamerge_errors(name: str) -> None:
    assert issubclass(getattr(dm, name), dm.DatamergeError)


def test_type_checkers_see_the_same_objects() -> None:
    tree = ast.parse((ROOT / "datamerge" / "__init__.py").read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {
        name.asname or name.name: getattr(importlib.import_module(str(node.module)), name.name)
        for node in imports
        for name in node.names
    }
    assert {name: getattr(dm, name) for name in NAMES} == seen


def test_no_module_has_the_name_of_a_public_name() -> None:
    """Importing a module `datamerge.merge` would replace the function `merge`."""
    assert not {module.name for module in pkgutil.iter_modules(dm.__path__)} & set(dm.__all__)


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="surprise"):
        dm.surprise  # type: ignore[attr-defined] # noqa: B018 - it raises
    with pytest.raises(ImportError):
        from datamerge import surprise  # type: ignore[attr-defined] # noqa: F401 - likewise


def _python(code: str, *flags: str, path: Path = ROOT) -> str:
    command = [sys.executable, *flags, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_datamerge_imports_nothing_else() -> None:
    """So it takes a millisecond."""
    code = "before = set(sys.modules)\nimport datamerge\nprint(sorted(set(sys.modules) - before))"
    assert _python(code) == "['datamerge']\n"


def test_names_for_reading_import_no_torch() -> None:
    code = "import datamerge as dm; dm.open_artifact, dm.verify, dm.convert, dm.Record; print('torch' in sys.modules)"
    assert _python(code) == "False\n"


def test_a_checkout_that_is_not_installed_has_a_version(tmp_path: Path) -> None:
    assert _python("import datamerge; print(datamerge.__version__)", "-S") == "0+unknown\n"
    shutil.copytree(Path(click.__file__).parent, tmp_path / "click")
    code = f"sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['datamerge', '--version']\n"
    assert _python(f"{code}import datamerge.cli; datamerge.cli.main()", "-S") == "datamerge, version 0+unknown\n"


def test_a_missing_package_names_its_extra() -> None:
    code = (
        "sys.modules['torch'] = None\nimport datamerge as dm\n"
        "try:\n    dm.train\nexcept ImportError as error:\n    print(error)"
    )
    assert _python(code) == "datamerge.train needs the package 'torch': pip install 'datamerge[train]'\n"


@pytest.mark.parametrize("module", ["trainer.nothing", "datamerge.nothing.at_all"])
def test_a_module_of_ours_that_is_missing_is_a_bug(module: str) -> None:
    """It is not reported as a missing extra."""
    assert module.partition(".")[0] in OURS
    with pytest.raises(ModuleNotFoundError) as caught:
        load(module, "x", extra="train", needed_by="x")
    assert not isinstance(caught.value, Unavailable)
