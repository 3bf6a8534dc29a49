"""The lesson in JupyterLab in a real browser: all cells, the slider, an exercise in three states.

    pip install playwright && python tests/browser.py

It needs Chromium (on Debian: apt-get install chromium) and a copy of the base in out/tiny
(`python train.py` makes it). It runs a copy of the notebook, and saves out/slider.png.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
ADDRESS = "http://127.0.0.1:8765"
OPTIONS = "--no-browser --allow-root --port 8765 --expose-app-in-browser --IdentityProvider.token="
ANSWERS = {  # the line of exercise 2, and what its check must say
    "return ...": "not yet",
    "return r * n_in * n_out": "not right: at rank 1",
    "return r * (n_in + n_out)": "right",
}
RUN_CELL = """async ([text, source]) => {
    const notebook = jupyterapp.shell.currentWidget.content;
    const i = notebook.widgets.findIndex(cell => cell.model.sharedModel.getSource().includes(text));
    const cell = notebook.widgets[i];
    if (source) cell.model.sharedModel.setSource(source);
    notebook.activeCellIndex = i;
    await jupyterapp.commands.execute("notebook:run-cell");
    cell.node.scrollIntoView();
    return JSON.stringify(cell.model.outputs.toJSON());
}"""
ALL_OUTPUTS = """() => jupyterapp.shell.currentWidget.content.widgets
    .filter(cell => cell.model.type == "code")
    .flatMap(cell => cell.model.outputs.toJSON().map(output => output.output_type))"""


def check_lesson(page):
    page.goto(f"{ADDRESS}/lab/tree/notebooks/lora.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_function(
        "jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status == 'idle'"
    )
    start_time = time.time()
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    assert "error" not in page.evaluate(ALL_OUTPUTS)
    print(f"all cells ran in {time.time() - start_time:.0f} s")

    page.evaluate(RUN_CELL, ["slider.observe(", None])
    picture, handle = page.locator(".jp-OutputArea .widget-image"), page.locator(".noUi-handle")
    before = picture.get_attribute("src")
    handle.press("ArrowRight")
    page.wait_for_function(f"document.querySelector('.widget-image').src != '{before}'")
    page.screenshot(path=ROOT / "out/slider.png")
    print("the slider redraws the picture")

    for line, expected in ANSWERS.items():
        exercise = f"def n_trained(n_in, n_out, r):\n    {line}"
        page.evaluate(RUN_CELL, ["def n_trained(", exercise])
        output = page.evaluate(RUN_CELL, ["check(n_trained", None])
        assert f'"{expected}' in output.replace("\\n", '"'), output
        print(f"{line:<28} {expected}")


def main():
    with tempfile.TemporaryDirectory() as dir:
        shutil.copytree(ROOT, dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        command = [sys.executable, "-m", "jupyterlab", *OPTIONS.split()]
        server = subprocess.Popen(command, cwd=dir, stderr=subprocess.DEVNULL)
        try:
            for _ in range(60):
                time.sleep(1)
                try:
                    urllib.request.urlopen(f"{ADDRESS}/api")
                    break
                except OSError:
                    pass
            with sync_playwright() as playwright:
                path = shutil.which("chromium") or shutil.which("google-chrome")
                options = dict(executable_path=path, args=["--no-sandbox"])
                browser = playwright.chromium.launch(**options)
                page = browser.new_page(viewport=dict(width=1300, height=900))
                page.set_default_timeout(600_000)
                check_lesson(page)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
