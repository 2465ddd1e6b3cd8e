"""The package as a user has it: names that load on first use, one console script, configurations by name."""

import inspect
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import transmamba_jax as tm
from pallas_kernels import ssd
from transmamba_jax import __main__ as console
from transmamba_jax import config_io

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("code", ["import transmamba_jax", "from transmamba_jax import __main__ as m; m.main([])"])
def test_neither_import_nor_the_console_loads_jax(code: str) -> None:
    code = f"import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); {code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.stdout == "False\n", result.stderr
    assert ("usage: transmamba NAME" in result.stderr) == ("main" in code)


def test_every_public_name_loads() -> None:
    assert {*tm._HOMES, *tm._MODULES, "__version__"} == set(tm.__all__)
    for name in tm.__all__:
        assert isinstance(getattr(tm, name), types.ModuleType) == (name in tm._MODULES), name
    assert set(tm.__all__) <= set(dir(tm))
    with pytest.raises(AttributeError, match="module 'transmamba_jax' has no attribute 'no_such_name'"):
        tm.no_such_name  # noqa: B018


def test_a_function_named_like_its_module_stays_a_function() -> None:
    code = "import transmamba_jax as tm, transmamba_jax.generate.decode, transmamba_jax.memory_converter\n"
    code += "print(tm.generate.__name__, tm.memory_converter.__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "generate memory_converter\n"


@pytest.mark.parametrize("name", console.commands())
def test_every_command_answers_under_its_name(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["transmamba"])
    module = f"transmamba_jax.{console.commands()[name]}"
    for imported in (f"{module}.__main__", module if module.startswith("transmamba_jax.data.") else ""):
        monkeypatch.delitem(sys.modules, imported, raising=False)  # Python warns of a module that is run when imported
    with pytest.raises(SystemExit) as end:
        console.main([name, "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: transmamba {name} ")
    assert name != "train" or all(f" {option} " in output for option in ("--config", "--compile-only", "--topology"))
    assert console.summary(console.commands()[name])


def test_the_console_lists_commands_and_refuses_others(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        console.main(["--help"])
    listed = capsys.readouterr().out
    assert all(
        f"\n  {name} " in listed for name in ("train", "generate", "evaluate", "convert", "export", "checkpoint")
    )
    with pytest.raises(SystemExit) as end:
        console.main(["trian"])
    assert end.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_configurations_have_names() -> None:
    for name in config_io.config_names():
        assert tm.load_config(name) == tm.load_config(ROOT / "configs" / f"{name}.yaml")
    assert {"tiny", "paper/transmamba-1b5"} <= set(config_io.config_names())
    assert tm.load_config("tiny", ["--train.steps", "7"]).train.steps == 7
    with pytest.raises(ValueError, match=r"one of paper/hybrid-1b5, .*, tiny.*; found 'tny'; did you mean 'tiny'\?"):
        tm.load_config("tny")


def test_every_make_target_has_a_rule() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert set(targets.split()) == set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))


def _public() -> dict[str, Any]:
    """Return the functions, methods and classes that the package, its modules and the kernels export, by name."""
    found: dict[str, Any] = {}
    for name, value in [(name, getattr(tm, name)) for name in tm.__all__ if name != "__version__"]:
        if isinstance(value, types.ModuleType):
            own = [key for key, each in vars(value).items() if getattr(each, "__module__", "") == value.__name__]
            names = getattr(value, "__all__", [key for key in own if not key.startswith("_")])
            found |= {f"{name}.{key}": getattr(value, key) for key in names}
        else:
            found[name] = value
    found |= {f"ssd.{name}": getattr(ssd, name) for name in ssd.__all__}
    for name, value in [item for item in found.items() if inspect.isclass(item[1])]:
        for key, member in vars(value).items():
            inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if not key.startswith("_") and inspect.isfunction(inspect.unwrap(inner)):
                found[f"{name}.{key}"] = inner
    return {name: inspect.unwrap(value) for name, value in found.items() if callable(value)}


def test_the_public_api_is_annotated_and_documented() -> None:
    public = _public()
    assert {"TransMamba", "generate", "schedule.v9", "export.load", "convert.to_mamba2", "ssd.ssd"} <= public.keys()
    assert [name for name, value in public.items() if not inspect.getdoc(value)] == []
    annotations = {
        f"{name}({key})": annotation is not inspect.Parameter.empty
        for name, value in public.items()
        if inspect.isfunction(value)
        for key, annotation in _annotations(value)
    }
    missing = [name for name, there in annotations.items() if not there]
    assert len(missing) <= 0.02 * len(annotations), missing


def _annotations(function: Any) -> list[tuple[str, Any]]:
    signature = inspect.signature(function)
    of_parameters = [(key, each.annotation) for key, each in signature.parameters.items() if key not in ("self", "cls")]
    return [*of_parameters, ("return", signature.return_annotation)]
