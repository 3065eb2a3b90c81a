"""The code that every folder in our layout carries, so that AutoModel loads it where biote is not installed.

transformers copies a class's own module and what it imports relatively; a port's module imports `biote.runtime`.
"""

import re
import sys
from pathlib import Path

from . import runtime
from .port import port_of

LEFT_OUT = ("__init__.py", "verify.py")  # golden values need the second, and an export brings both


def write_code(config_class: type, folder: Path) -> dict[str, str]:
    """Write the port's model file and the runtime, side by side with relative imports; return the auto_map of both.

    Nothing is written, and the auto_map is empty, for a configuration that is no port's own.
    """
    port = port_of(config_class)
    if port is None or port.config_class is not config_class:
        return {}
    model_file = Path(sys.modules[config_class.__module__].__file__ or "")
    for file in (*Path(runtime.__file__).parent.glob("*.py"), model_file):
        if file.name not in LEFT_OUT:
            text = file.read_text(encoding="utf-8")
            text = re.sub(r"^from biote\.runtime\.(\w+) import", r"from .\1 import", text, flags=re.M)
            (folder / file.name).write_text(text, encoding="utf-8")
    classes = {"AutoConfig": config_class, **port.classes}
    return {auto: f"{model_file.stem}.{cls.__name__}" for auto, cls in classes.items()}
