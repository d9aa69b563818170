"""Test the limits on lines of files and functions, and on parameters of functions."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

MAX_FILE_LINES = 400  # except kernels
MAX_FUNCTION_LINES = 60  # except kernels; without the docstring
MAX_PARAMETERS, MAX_KERNEL_PARAMETERS = 6, 12  # positional parameters

# torch sets the signature of a method that overrides a method of torch.
OVERRIDES = {
    ("qwen_vit/integrations/hf_tower.py", "_load_from_state_dict"),
}


class Function(NamedTuple):
    """Describe a function of a file: its lines and parameters."""

    path: str
    name: str
    n_lines: int
    n_parameters: int
    is_jit: bool

    @property
    def is_in_kernels(self) -> bool:
        return self.path.startswith("qwen_vit/kernels/")


def sources(*folders: str) -> Iterator[tuple[str, Path]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path


def n_lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def functions_of(source: str, path: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        n_docstring = n_lines_of(node.body[0]) if ast.get_docstring(node) else 0
        n_lines = n_lines_of(node) - n_docstring
        names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
        n_parameters = len(names) - (names[:1] in (["self"], ["cls"]))
        is_jit = any("jit" in ast.unparse(each) for each in node.decorator_list)
        yield Function(path, node.name, n_lines, n_parameters, is_jit)


def functions(*folders: str) -> list[Function]:
    return [
        each
        for name, path in sources(*folders)
        for each in functions_of(path.read_text("utf-8"), name)
    ]


def test_files_are_short() -> None:
    long = {
        name: n_lines
        for name, path in sources("qwen_vit", "tools", "tests")
        if not name.startswith("qwen_vit/kernels/")
        and (n_lines := len(path.read_text("utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert long == {}


def test_functions_are_short() -> None:
    found = functions("qwen_vit", "tools")
    assert len(found) > 1_000
    long = [each for each in found if each.n_lines > MAX_FUNCTION_LINES and not each.is_in_kernels]
    assert long == []


def test_functions_have_few_parameters() -> None:
    found = [each for each in functions("qwen_vit") if (each.path, each.name) not in OVERRIDES]
    kernels = [each for each in found if each.is_in_kernels]
    assert len(kernels) > 50
    assert [e for e in kernels if e.n_parameters > MAX_KERNEL_PARAMETERS and not e.is_jit] == []
    others = [each for each in found if not each.is_in_kernels]
    assert [each for each in others if each.n_parameters > MAX_PARAMETERS] == []


def test_lines_and_parameters_are_counted() -> None:
    source = """
class Thing:
    def method(self, a, b=1, /, c=2, *rest, d, e=5, **more):
        '''Two lines
        of words.'''
        return a

@triton.jit(do_not_specialize=["n"])
async def kernel(x, y):
    pass
"""
    assert list(functions_of(source, "a.py")) == [
        Function("a.py", "kernel", 2, 2, True),
        Function("a.py", "method", 2, 3, False),
    ]
