"""The notebooks: saved as they ran; with --slow, every cell runs again in quick mode."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_text(output):
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


def printed_text(cell):
    return "".join(output_text(output) for output in cell.outputs)


def prints_or_plots(cell):
    """Whether the cell calls `print` or `plt.show` itself, not in a function that it defines."""
    statements = [s for s in ast.parse(cell.source).body if not isinstance(s, ast.FunctionDef)]
    calls = [node for s in statements for node in ast.walk(s) if isinstance(node, ast.Call)]
    names = [getattr(call.func, "id", getattr(call.func, "attr", "")) for call in calls]
    return "print" in names or "show" in names


def add_solutions(notebook):
    """Append each exercise's solution, then its check again. Returns the appended checks."""
    checks = []
    for check, solution in zip(list(notebook.cells), notebook.cells[1:], strict=False):
        if solution.cell_type == "markdown" and "<details>" in solution.source:
            source = re.search(r"```python\n(.*?)```", solution.source, re.DOTALL)[1]
            checks.append(nbformat.v4.new_code_cell(check.source))
            notebook.cells += [nbformat.v4.new_code_cell(source), checks[-1]]
    return checks


@each_notebook
def test_saved_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.source for cell in cells if prints_or_plots(cell) and not cell.outputs] == []


@each_notebook
def test_no_errors_or_warnings_are_saved(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


@each_notebook
def test_no_paths_of_the_machine_are_saved(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        for text in (cell.source, printed_text(cell)):
            assert not re.search(r"(?<![\w.])/(work|root|home|tmp|Users)\b", text), text


@each_notebook
def test_cells_are_valid_python_3_10(path):
    notebook = nbformat.read(path, as_version=4)
    add_solutions(notebook)
    for cell in code_cells(notebook):
        ast.parse(cell.source, feature_version=(3, 10))


@pytest.mark.slow
@each_notebook
def test_runs_in_quick_mode_and_solutions_are_right(path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_QUICK", "1")
    notebook = nbformat.read(path, as_version=4)
    checks = add_solutions(notebook)
    options = {"kernel_name": "python3", "resources": {"metadata": {"path": str(path.parent)}}}
    NotebookClient(notebook, timeout=600, **options).execute()  # raises if a cell does
    for check in checks:
        assert "right" in printed_text(check).splitlines(), f"{check.source}\n{printed_text(check)}"
