"""Make the notebooks of the scripts that are written in cells, without outputs: `make notebooks`."""

from pathlib import Path

import jupytext

FOLDER = Path(__file__).parent
SCRIPTS = ("embed_proteins", "score_scan")


def notebook(script: Path) -> str:
    """The script as the text of an .ipynb: the same whenever it is made."""
    made = jupytext.read(script)
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return jupytext.writes(made, fmt="ipynb")


if __name__ == "__main__":
    for name in SCRIPTS:
        (FOLDER / f"{name}.ipynb").write_text(notebook(FOLDER / f"{name}.py") + "\n", encoding="utf-8")
