__version__ = "0.2.0"

__doc__ = "KS-Lottery: find, tune, certify and doubt winning tickets in the embedding layer of language models."

from importlib import import_module
from typing import Any

_ROOMS = {
    "core": "load_model",
    "data": "Pair Prompt encode_all load_pairs",
    "ks": "ks_scan",
    "plots": "plot_plan plot_scan",
    "rows": "TunedRows add_tokens",
    "training": "Engine",
    "tuning": "Recipe embed_tune partial_tune partial_transfer",
    "evaluation": "Generation Translation translate score",
    "decomposition": "Bootstrap decompose",
    "certificate": "certify_agreement plan_certificate",
    "ticket": "Ticket TicketBank",
    "checkpoints": "scan_checkpoints",
    "lottery": "find_ticket",
    "audit": "AuditSettings audit_models audit_ticket",
    "calibration": "CertifySettings certify_ticket plan_calibration",
    "stops": "examine_stops mend_stops",
    "babel": "build_world",
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names.split()}  # the stub beside has it too
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:  # imports a name of the face out of its module (PEP 562)
    if name not in _WHERE:
        raise AttributeError(f"kslottery has no {name}: it has {', '.join(__all__)}, and modules such as kslottery.ks")
    globals()[name] = getattr(import_module(f"kslottery.{_WHERE[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:  # for tab completion
    return sorted([*__all__, "__doc__", "__version__"])
