"""Export Geneformer to a self-contained Hub folder: `python export.py Geneformer-V2-104M --output DIR`."""

from biote.cli import port_export, run

if __name__ == "__main__":
    run(port_export("geneformer"))
