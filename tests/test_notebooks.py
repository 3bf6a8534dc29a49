"""The notebooks: saved as they ran, and, with --slow, run again from top to bottom in a fresh kernel."""

import ast
import copy
import functools
import inspect
import re
from pathlib import Path

import nbformat
import parso  # comes with jupyter
import pytest
import torch
from nbclient import NotebookClient

import gpt
import lora
import train
from notebooks import lesson, toy

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


@each_notebook
def test_cells_fit_on_a_screen(path):
    for cell in code_cells(nbformat.read(path, 4)):
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden")
        assert hidden or cell.source.count("\n") < 40, cell.source[:60]


@each_notebook
def test_sources_that_it_printed_are_those_of_the_files(path):
    for cell in code_cells(nbformat.read(path, 4)):
        for name in re.findall(r"print\(inspect\.getsource\(([\w.]+)\)", cell.source):
            module = next(m for m in (gpt, lora, train, toy, lesson) if hasattr(m, name.split(".")[0]))
            source = inspect.getsource(functools.reduce(getattr, name.split("."), module))
            assert source in "".join(map(text_of, cell.outputs)), f"{name} has changed: run {path.name} again"


def with_solutions(notebook):
    """Append to the notebook each exercise's solution and its check once more. Returns the checks."""
    checks = []
    for i, cell in enumerate(list(notebook.cells)):
        if cell.cell_type == "markdown" and "<details>" in cell.source:
            solution = re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)[1]
            checks.append(nbformat.v4.new_code_cell(notebook.cells[i - 1].source))
            notebook.cells += [nbformat.v4.new_code_cell(solution), checks[-1]]
    return checks


def picture():
    """methods.ipynb's methods, {name: (how it begins, its budgets)}, out of the cells that define them."""
    config = gpt.GPTConfig(block_size=48, vocab_size=97, n_layer=2, n_head=4, n_embd=32)
    names = vars(torch) | vars(lesson) | vars(lora) | vars(gpt) | dict(torch=torch, config=config)
    for cell in code_cells(nbformat.read(NOTEBOOKS[0].parent / "methods.ipynb", 4)):
        if re.search(r"^(def bitfit|class PrefixGPT|def add_prefix|PICTURE = |ALL = )", cell.source, re.MULTILINE):
            tree = ast.parse(cell.source)
            tree.body = [s for s in tree.body if not isinstance(s, ast.Assign | ast.Expr) or s.targets[0].id.isupper()]
            exec(compile(tree, "methods.ipynb", "exec"), names)
    return config, names["PICTURE"]


CONFIG, PICTURE = picture()
V, T, L, C = CONFIG.vocab_size, CONFIG.block_size, CONFIG.n_layer, CONFIG.n_embd
BLOCK = 12 * C * C + 13 * C  # the parameters of one
TRAINED = {  # {method: (how many parameters it trains, which ones)}
    "LoRA, q v": (lambda r: L * 2 * r * 2 * C, r"c_[qv]\.lora_[AB]"),
    "LoRA, all": (lambda r: L * r * 18 * C, r"lora_[AB]"),
    "LoRA + prefix": (lambda r: L * 2 * r * 2 * C + 4 * C, r"c_[qv]\.lora_[AB]|prefix"),
    "BitFit": (lambda _: L * 11 * C + C, r"bias"),
    "top blocks": (lambda k: k * BLOCK, r"h\.1\."),
    "prefix-embedding": (lambda l: l * C, r"prefix"),
    "prefix-layer": (lambda l: L * l * C, r"prefix"),
    "Adapter^H": (lambda w: L * 2 * (2 * C * w + w + C), r"(attn|mlp)\.(down|up)\."),
    "Adapter^L": (lambda w: L * (2 * C * w + w + C + 2 * C), r"mlp\.(norm|down|up)\."),
    "full": (lambda _: (V + T) * C + L * BLOCK + 2 * C, r""),
}


@pytest.mark.parametrize("method", PICTURE)
def test_other_methods(method):
    begin, budgets = PICTURE[method]
    count, where = TRAINED[method]
    torch.manual_seed(0)
    base = gpt.GPT(CONFIG).requires_grad_(False)
    idx = torch.randint(V, (3, 8))
    for budget in [b for b in budgets if method != "top blocks" or b == 1]:
        model = copy.deepcopy(base)
        begin(model, budget)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert sum(model.get_parameter(name).numel() for name in trained) == count(budget)
        assert all(re.search(where, name) for name in trained)
        if "prefix" not in method.lower():
            assert torch.equal(model(idx), base(idx))
        for p in model.parameters():  # away from the start, where B and the adapters' last layers are zero
            p.data += 0.05 * torch.randn_like(p)
        model(idx, idx).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
        text = torch.cat([idx, torch.stack(list(model.generate(idx, 4, temperature=0)), 1)], 1)
        assert torch.equal(model(text)[:, 7:-1].argmax(-1), text[:, 8:])  # with and without a cache


# Three notebooks are many fair trials and no exercises: here each trial gets a quarter of its steps.
A_QUARTER = """
from notebooks import lesson

def train_a_quarter(model, examples, held_out, args, report):
    args.steps, args.eval_every = args.steps // 4, args.eval_every // 4
    return train(model, examples, held_out, args, report)

train, lesson.train = lesson.train, train_a_quarter
"""


@pytest.mark.slow
@each_notebook
def test_runs_and_its_solutions_are_right(path):
    notebook = nbformat.read(path, 4)
    checks = with_solutions(notebook)
    if path.name in ("paper.ipynb", "quality.ipynb", "methods.ipynb"):
        notebook.cells.insert(2, nbformat.v4.new_code_cell(A_QUARTER))  # cell 1 says where lesson.py is
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()  # raises on an error
    for check in checks:
        printed = "".join(map(text_of, check.outputs)).splitlines()
        assert "right" in printed, f"{check.source}\n{printed}"
