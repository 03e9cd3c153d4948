__version__ = "0.2.0"

__doc__ = "KS-Lottery: find, tune, certify and doubt winning tickets in the embedding layer of language models."

from importlib import import_module
from typing import TYPE_CHECKING, Any

_ROOMS = {
    "core": "load_model",
    "data": "Pair Prompt load_pairs",
    "ks": "ks_scan",
    "rows": "TunedRows",
    "training": "Engine",
    "tuning": "Recipe embed_tune partial_tune partial_transfer",
    "evaluation": "Generation translate score",
    "decomposition": "Bootstrap decompose",
    "ticket": "Ticket TicketBank",
    "checkpoints": "scan_checkpoints",
    "lottery": "find_ticket",
    "audit": "AuditSettings audit_ticket",
    "calibration": "CertifySettings certify_ticket",
    "babel": "build_world",
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names.split()}  # a name is imported when it is used
__all__ = [*_WHERE]

if TYPE_CHECKING:
    from .audit import AuditSettings as AuditSettings, audit_ticket as audit_ticket
    from .babel import build_world as build_world
    from .calibration import CertifySettings as CertifySettings, certify_ticket as certify_ticket
    from .checkpoints import scan_checkpoints as scan_checkpoints
    from .core import load_model as load_model
    from .data import Pair as Pair, Prompt as Prompt, load_pairs as load_pairs
    from .decomposition import Bootstrap as Bootstrap, decompose as decompose
    from .evaluation import Generation as Generation, score as score, translate as translate
    from .ks import ks_scan as ks_scan
    from .lottery import find_ticket as find_ticket
    from .rows import TunedRows as TunedRows
    from .ticket import Ticket as Ticket, TicketBank as TicketBank
    from .training import Engine as Engine
    from .tuning import (
        Recipe as Recipe,
        embed_tune as embed_tune,
        partial_transfer as partial_transfer,
        partial_tune as partial_tune,
    )


def __getattr__(name: str) -> Any:
    "Import a name of the face out of its module (PEP 562)."
    if name not in _WHERE:
        raise AttributeError(f"kslottery has no {name}: it has {', '.join(__all__)}, and modules such as kslottery.ks")
    globals()[name] = getattr(import_module(f"kslottery.{_WHERE[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    "The names of the face, for tab completion."
    return sorted([*__all__, "__doc__", "__version__"])
