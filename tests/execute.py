"""Execute notebooks at full size and store their outputs: python tests/execute.py [notebook ...].

A notebook that fails is left as it was.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill


def joined(outputs):
    "Outputs with what was written to one stream piece by piece in one piece."
    found = []
    for output in outputs:
        if found and output.output_type == "stream" == found[-1].output_type and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


root = Path(__file__).resolve().parent.parent
notebooks = [Path(n).resolve() for n in sys.argv[1:]] or sorted(
    p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
os.environ["PATH"] = (
    f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # how-to pages call kslottery from a shell
)
os.environ["KSLOTTERY_PROGRESS"] = os.devnull  # bars and warnings do not belong into stored outputs
os.environ |= {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
for notebook in notebooks:
    print(notebook.relative_to(root), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / notebook.name
        papermill.execute_notebook(str(notebook), str(done), kernel_name="python3", cwd=folder, progress_bar=False)
        executed = nbformat.read(done, as_version=4)
        for cell in executed.cells:
            if cell.cell_type == "code":
                cell.outputs = joined(cell.outputs)
        nbformat.write(executed, notebook)
subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=root, check=True)
