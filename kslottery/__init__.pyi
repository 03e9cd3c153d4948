# What type checkers and editors see: the names that __init__.py imports when they are used.
from .audit import AuditSettings as AuditSettings, audit_models as audit_models, audit_ticket as audit_ticket
from .babel import build_world as build_world
from .calibration import (
    CertifySettings as CertifySettings,
    certify_ticket as certify_ticket,
    plan_calibration as plan_calibration,
)
from .certificate import certify_agreement as certify_agreement, plan_certificate as plan_certificate
from .checkpoints import scan_checkpoints as scan_checkpoints
from .core import load_model as load_model
from .data import Pair as Pair, Prompt as Prompt, encode_all as encode_all, load_pairs as load_pairs
from .decomposition import Bootstrap as Bootstrap, decompose as decompose
from .evaluation import (
    Generation as Generation,
    Translation as Translation,
    score as score,
    translate as translate,
)
from .ks import ks_scan as ks_scan
from .lottery import find_ticket as find_ticket
from .plots import plot_plan as plot_plan, plot_scan as plot_scan
from .rows import TunedRows as TunedRows, add_tokens as add_tokens
from .stops import examine_stops as examine_stops, mend_stops as mend_stops
from .ticket import Ticket as Ticket, TicketBank as TicketBank
from .training import Engine as Engine
from .tuning import (
    Recipe as Recipe,
    embed_tune as embed_tune,
    partial_transfer as partial_transfer,
    partial_tune as partial_tune,
)

__version__: str
