"""Export Geneformer to a self-contained Hub folder: `python models/geneformer/export.py Geneformer-V2-104M --output DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from biote.cli import Source, run
from biote.export import export

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    source: Source,
    output: Annotated[Path, typer.Option(help="a folder that does not exist yet")],
    push: Annotated[str | None, typer.Option(metavar="REPO_ID", help="upload to this Hub repository")] = None,
) -> None:
    """Convert, bundle and verify an original Geneformer checkpoint (tag, Hub id or folder)."""
    export(source, output, port_name="geneformer", push=push)


if __name__ == "__main__":
    run(app)
