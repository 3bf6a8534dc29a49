"""The notebooks: saved as they ran; with --slow, every cell runs again in quick mode."""

import ast
import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from notebooks import lesson

FOLDER = Path(lesson.__file__).parent
NOTEBOOKS = sorted(set(FOLDER.glob("*.ipynb")) - set(FOLDER.glob("*-student.ipynb")))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_text(output):
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


def printed_text(cell):
    return "\n".join(output_text(output) for output in cell.outputs)


def prints_or_plots(cell):
    """Whether the cell calls `print` or `plt.show` itself, not in a function that it defines."""
    statements = [s for s in ast.parse(cell.source).body if not isinstance(s, ast.FunctionDef)]
    calls = [node for s in statements for node in ast.walk(s) if isinstance(node, ast.Call)]
    names = [getattr(call.func, "id", getattr(call.func, "attr", "")) for call in calls]
    return "print" in names or "show" in names


def solve(notebook):
    """Put each exercise's solution into its cell. Returns the cells that check them."""
    checks = []
    for exercise, check, solution in zip(*(notebook.cells[i:] for i in range(3)), strict=False):
        if "solution" in solution.metadata.get("tags", []) and "```python" in solution.source:
            exercise.source = re.search(r"```python\n(.*?)```", solution.source, re.DOTALL)[1]
            checks.append(check)
    return checks


def run_quickly(notebook, path, monkeypatch):
    """Run all cells in quick mode. Raises an error if a cell does."""
    monkeypatch.setenv("NOTEBOOK_QUICK", "1")
    options = {"kernel_name": "python3", "resources": {"metadata": {"path": str(path.parent)}}}
    NotebookClient(notebook, timeout=600, **options).execute()


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
    cells = code_cells(notebook)
    solve(notebook)
    for cell in cells + code_cells(notebook):
        ast.parse(cell.source, feature_version=(3, 10))


ANSWERS = [(..., "not yet"), (lambda: ..., "not yet"), (lambda: 1, "not right: it is 1")]
ANSWERS += [(lambda: 1 + "", "not right: line"), (lambda: 2, "right")]


@pytest.mark.parametrize("answer, verdict", ANSWERS)
def test_an_exercise_is_open_wrong_or_right(answer, verdict, capsys):
    def must_be_2(answer):
        assert answer() == 2, f"it is {answer()}"

    is_right = lesson.check(answer, must_be_2)
    assert capsys.readouterr().out.startswith(verdict) and is_right == (verdict == "right")


@each_notebook
def test_its_verdicts_are_in_the_guide(path):
    guide = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    for cell in code_cells(nbformat.read(path, as_version=4)):
        for output in cell.outputs if "show_verdicts" in cell.source else []:
            for row in output.get("data", {}).get("text/markdown", "").splitlines():
                assert row in guide, row


def test_lr_search_goes_on_until_the_best_rate_is_inside():
    losses = lesson.lr_search(lambda lr: abs(math.log(lr / 0.2)), first_lr=1e-3)
    best = min(losses, key=losses.get)
    assert 0.2 / 3 < best < 0.2 * 3 and min(losses) < best < max(losses)


def test_equal_methods_look_different_one_time_in_twenty():
    draws = torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(0)).tolist()
    verdicts = [lesson.compare(ours, theirs) for ours, theirs in draws]
    assert verdicts.count("lower") / 4000 == pytest.approx(0.025, abs=0.008)
    assert verdicts.count("higher") / 4000 == pytest.approx(0.025, abs=0.008)
    assert lesson.compare([97.0] * 3, [100.0] * 3) == "lower"
    assert lesson.compare([97.0] * 3, [100.0] * 3, n_texts=16) == "no difference shown"


@pytest.mark.slow
@each_notebook
def test_runs_in_quick_mode(path, monkeypatch):
    run_quickly(nbformat.read(path, as_version=4), path, monkeypatch)


@pytest.mark.slow
@each_notebook
def test_solutions_are_right(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    checks = solve(notebook)
    if not checks:
        pytest.skip("no exercises")
    run_quickly(notebook, path, monkeypatch)
    for check in checks:
        assert "right" in printed_text(check).splitlines(), f"{check.source}\n{printed_text(check)}"
    printed = "\n".join(map(printed_text, code_cells(notebook)))
    losses = re.findall(r"^yours +(\d\.\d+)\n+lora\.py +(\d\.\d+)$", printed, re.MULTILINE)
    assert len(losses) == (path.name == "lora.ipynb")
    assert all(a == b for a, b in losses)  # the student's layer trains as lora.py's does
