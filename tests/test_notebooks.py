"""The notebooks: saved as they ran, and, with --slow, run again from top to bottom in a fresh kernel."""

import ast
import re
from pathlib import Path

import nbformat
import parso  # comes with jupyter
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output):
    return output.get("text", "") or "".join(output.get("data", {}).get("text/plain", ""))


def python(source):
    """A cell without IPython's own commands."""
    return "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!"))) + "\n"


def shows(source):
    """Whether the cell prints or plots when it runs, rather than in a function that it defines."""
    statements = [s for s in ast.parse(python(source)).body if not isinstance(s, ast.FunctionDef)]
    calls = [node.func for s in statements for node in ast.walk(s) if isinstance(node, ast.Call)]
    return any(getattr(f, "id", getattr(f, "attr", "")) in ("print", "show") for f in calls)


def test_there_are_notebooks():
    assert "lora.ipynb" in [path.name for path in NOTEBOOKS]


@each_notebook
def test_saved_as_it_ran(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.source for cell in cells if shows(cell.source) and not cell.outputs] == []
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", f"a warning was saved: {text_of(output)}"
            assert text_of(output).count("\n") < 40, f"longer than a screen: {cell.source[:60]}"


@each_notebook
def test_no_paths_of_the_machine_it_ran_on(path):
    for cell in nbformat.read(path, 4).cells:
        for text in [cell.source, *map(text_of, cell.get("outputs", []))]:
            assert not re.search(r"(?<![\w.])/(work|root|home|tmp|Users)\b|\.\./shared", text), text


PYTHON_3_10 = parso.load_grammar(version="3.10")  # ast.parse with a feature_version lets a star in an index pass


def mistakes(source):
    """What Python 3.10 cannot read in a cell."""
    return [error.message for error in PYTHON_3_10.iter_errors(PYTHON_3_10.parse(python(source)))]


@pytest.mark.parametrize("newer", ["a[b, *c]", "f'{a['b']}'", "type X = int", "def f[T](): pass"])
def test_what_python_3_10_cannot_read_is_seen(newer):
    assert mistakes(newer) and not mistakes("%matplotlib inline\na[(b, *c)], f'{a}'")


@each_notebook
def test_every_cell_is_python_3_10(path):
    notebook = nbformat.read(path, 4)
    with_solutions(notebook)
    assert [cell.source for cell in code_cells(notebook) if mistakes(cell.source)] == []


def with_solutions(notebook):
    """Append to the notebook each exercise's solution and its check once more. Returns the checks."""
    checks = []
    for i, cell in enumerate(list(notebook.cells)):
        if cell.cell_type == "markdown" and "<details>" in cell.source:
            solution = re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)[1]
            checks.append(nbformat.v4.new_code_cell(notebook.cells[i - 1].source))
            notebook.cells += [nbformat.v4.new_code_cell(solution), checks[-1]]
    return checks


@pytest.mark.slow
@each_notebook
def test_runs_and_its_solutions_are_right(path):
    notebook = nbformat.read(path, 4)
    checks = with_solutions(notebook)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()  # raises on an error
    for check in checks:
        printed = "".join(map(text_of, check.outputs)).splitlines()
        assert "right" in printed, f"{check.source}\n{printed}"
