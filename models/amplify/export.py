"""Export AMPLIFY to a self-contained Hub folder: `python export.py AMPLIFY_120M --output DIR`."""

from biote.cli import port_export, run

if __name__ == "__main__":
    run(port_export("amplify"))
