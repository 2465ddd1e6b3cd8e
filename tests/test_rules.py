"""The rules of the project: its suite, on suites of one test, and the words of its docstrings."""

import ast
import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]


@pytest.fixture(name="outcomes")
def _outcomes(pytester, monkeypatch):
    """Return a function that runs a test file under this suite's options and conftest.py and counts the outcomes."""
    monkeypatch.setenv("XLA_FLAGS", "")  # the conftest.py adds to it
    pytester.makepyprojecttoml((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))

    def run(text: str) -> dict[str, int]:
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", pytester.makepyfile(text))
        return {name: count for name, count in result.parseoutcomes().items() if name != "warnings"}

    return run


@pytest.mark.parametrize("how", ["@pytest.mark.skip(reason='why')", "@pytest.mark.skipif(True, reason='why')", ""])
@pytest.mark.parametrize("marker", ["", "@pytest.mark.hardware"])
def test_a_skip_that_no_hardware_marker_explains_fails_the_run(outcomes, how, marker):
    body = "pass" if how else "pytest.skip('why')"
    found = outcomes(f"import pytest\n{marker}\n{how}\ndef test_it():\n    {body}")
    assert found in ([{"skipped": 1}] if marker else [{"failed": 1}, {"errors": 1}])


def test_a_module_may_not_skip_itself(outcomes):
    assert outcomes("import pytest\npytest.skip('why', allow_module_level=True)") == {"errors": 1}


def test_an_unknown_marker_is_an_error(outcomes):
    assert outcomes("import pytest\n@pytest.mark.hardwear\ndef test_it():\n    pass") == {"errors": 1}


def test_no_docstring_begins_with_a_question_word() -> None:
    files = [
        path for room in ("transmamba_jax", "pallas_kernels", "benchmarks") for path in ROOT.glob(f"{room}/**/*.py")
    ]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in [*files, ROOT / "train.py"]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if re.match(r"(What|How|Where|Whether|Who|Which)\b", text := ast.get_docstring(node) or "")
    ]
    assert found == []
