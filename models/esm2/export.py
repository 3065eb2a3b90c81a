"""Export ESM-2 to a self-contained Hub folder: `python export.py esm2_t6_8M_UR50D --output DIR`."""

from biote.cli import port_export, run

if __name__ == "__main__":
    run(port_export("esm2"))
