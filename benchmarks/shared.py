"""What benchmarks and tests share: where real text and models are, and the memory of this process.

Text and models are in KSLOTTERY_DATA and KSLOTTERY_MODELS, else in the folder `shared` beside the checkout.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shared(kind: str) -> Path:
    "The folder of all `data` or `models`; it need not exist."
    return Path(os.environ.get(f"KSLOTTERY_{kind.upper()}") or ROOT.parent / "shared" / kind).expanduser()


def memory(kind: str) -> float:
    "Of this process, in MB: `RssAnon` is anonymous memory now, `VmHWM` the peak of all that was resident."
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{kind}:\s+(\d+) kB", status, re.MULTILINE)[1]) / 1024
