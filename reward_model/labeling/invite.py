"""`rlhf label invite`: a link that makes one account."""

from __future__ import annotations

from reward_model.labeling import accounts
from reward_model.labeling.links import note_of, url_of
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage
from rlhf.errors import ConfigError


def main(cfg: LabelingStage, role: str) -> None:
    """Print an invite link. Who can run this can read the database, and so needs no login.

    Raises:
        ConfigError: the project has no accounts, or the address of its server cannot be known.
    """
    if not cfg.serve.accounts:
        raise ConfigError("this labeling project has no accounts", fix="set serve.accounts: true")
    url = url_of(cfg.serve, cfg.serve.port)
    with LabelStore.open(cfg) as store:
        token = accounts.create_invite(store, role, None)
    days = accounts.INVITE_MS // (24 * 3_600_000)
    print(f"{url}/invite/{token}\nfor one {role}, within {days} days", flush=True)
    if note := note_of(cfg.serve, url):
        print(note, flush=True)
