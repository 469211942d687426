"""The import order, and the duties that belong to one module."""

import ast
import re
from pathlib import Path

import bayling_delta

SOURCE = Path(bayling_delta.__file__).parent
ORDER = """
errors system tensors sources downloads strict_json files staging arithmetic gpu safetensors_format zip_records
state_pickle torch_format meta_format checkpoint recipes release_entry releases manifest tokenizer_files companions
hub expectations gathering copies sampling oddities looking suspicions reads pairing plan tally growing crew windows
adding engine journal resuming identifying sinks model_card loading preparing describing applying recording verifying
remaking repairing inspecting registering report cli __main__
""".split()


def code(module: str) -> str:
    return (SOURCE / f"{module}.py").read_text(encoding="utf-8")


def own_imports(module: str) -> set[str]:
    """Our modules that ``module`` imports anywhere, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(code(module))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("bayling_delta.")} & set(ORDER)


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == {*ORDER, "__init__"}


def test_modules_import_only_those_before_them() -> None:
    for place, module in enumerate(ORDER):
        assert own_imports(module) <= set(ORDER[:place]), module


def users_of(pattern: str) -> set[str]:
    return {module for module in ORDER if re.search(pattern, code(module), re.MULTILINE)}


def test_duties_have_one_home() -> None:
    assert users_of(r"\bclick\.echo\(|\bprint\(") == {"cli"}
    assert users_of(r"import numkong") == {"arithmetic"}
    assert users_of(r"import (torch|transformers)\b") == {"gpu", "loading"}
    assert users_of(r"(from|import) huggingface_hub\b") == {"hub", "plan"}  # plan has it cut shards
    assert users_of(r"^\s*(from|import) (socket|urllib\.request|http|httpx2?|requests)\b") == set()
    assert users_of(r"\bimport pickle\b|\bpickle\.(load|Unpickler)") == set()
    disk = r"\bos\.(open|pread|preadv|read|write|pwrite|stat|lstat|listdir|unlink|remove|rename|mkdir|rmdir|fsync)\("
    assert users_of(disk) - {"cli"} == {"system"}
    changes = r"calls\.(open_write|write_from|truncate|sync|make_directory|remove_\w+|rename_new|replace|preallocate)\("
    assert users_of(changes) == {"files", "staging"}
    assert users_of(r"\bcalls\.read_into\(") == {"sources"}


def test_no_assert_guards_a_users_data() -> None:
    assert users_of(r"^\s*assert\b") == set()
