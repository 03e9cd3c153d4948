"""Where real text and real models are: in KSLOTTERY_DATA and KSLOTTERY_MODELS, else in `shared` beside the checkout."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shared(kind: str) -> Path:
    "The folder of all `data` or `models`; it need not exist."
    return Path(os.environ.get(f"KSLOTTERY_{kind.upper()}") or ROOT.parent / "shared" / kind).expanduser()
