"""An overlay that was started before a rotation follows its coordinator's list."""

from __future__ import annotations

import dataclasses
import hashlib
import time

import pytest
from msgspec.structs import replace

from lumaris_overlay.coordinator_keys import CoordinatorKeys
from lumaris_overlay.notices import NoticeBoard, NoticeGate
from lumaris_overlay.supervisor import OverlayConfig, attach_or_spawn, end_shared
from lumaris_overlay.validate import MembershipGate
from lumaris_protocol import codec
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.advert import MembershipCertificate
from lumaris_protocol.messages.notice import KeyList, SigningKey
from tests.overlay.test_process import config_for
from tests.overlay.world import NETWORK

NET, NOW = "devnet", 1_800_000_000


def key_of(name: str) -> KeyPair:
    return KeyPair(hashlib.sha256(name.encode()).digest())


ROOT, OLD, NEW, PEER = (key_of(name) for name in ("root", "old", "new", "peer"))
LIST = KeyList(
    root=ROOT.peer_id,
    seq=2,
    keys=tuple(
        SigningKey(peer=key.peer_id, not_before=0, not_after=NOW + 9_000) for key in (OLD, NEW)
    ),
    issued_at=NOW,
)


def certificate(
    signer: KeyPair, *, peer: str = PEER.peer_id, at: int = NOW, network: str = NET
) -> bytes:
    message = MembershipCertificate(
        peer=peer,
        account="acc_" + "a" * 24,
        roles=("buyer",),
        bond_band=0,
        serial=1,
        issued_at=at,
        expires_at=at + 3_600,
    )
    return codec.sign(message, signer, network).data


def test_a_gate_takes_the_new_key_once_the_board_has_the_list() -> None:
    board = NoticeBoard(NoticeGate(NET, frozenset({OLD.peer_id}), frozenset({ROOT.peer_id})))
    gate = MembershipGate(NET, board.keys)

    def accepts(signer: KeyPair) -> bool:
        try:
            gate.check(certificate(signer), PEER.peer_id, NOW)
        except EnvelopeError:
            return False
        return True

    assert (accepts(OLD), accepts(NEW)) == (True, False)
    assert board.offer(codec.sign(LIST, ROOT, NET).data, NOW) is not None
    assert (accepts(OLD), accepts(NEW)) == (True, True)
    old, new = LIST.keys
    revoked = replace(LIST, seq=3, keys=(replace(old, revoked_at=NOW), new))
    assert board.offer(codec.sign(revoked, ROOT, NET).data, NOW) is not None
    assert (accepts(OLD), accepts(NEW)) == (False, True)
    # The list from before does not bring it back.
    board.offer(codec.sign(LIST, ROOT, NET).data, NOW)
    board.keys.learn(LIST)
    assert (accepts(OLD), accepts(NEW)) == (False, True)


def test_it_is_a_set() -> None:
    keys = CoordinatorKeys(frozenset({OLD.peer_id}))
    assert (list(keys), len(keys), OLD.peer_id in keys) == ([OLD.peer_id], 1, True)
    keys.learn(LIST)
    assert list(keys) == sorted((OLD.peer_id, NEW.peer_id))


@pytest.mark.planet
@pytest.mark.slow
async def test_a_running_process_is_the_same_coordinators_after_a_key_was_revoked(tmp_path) -> None:
    before = replace_config(config_for(tmp_path, "peer"), OLD)
    after = replace_config(before, NEW)
    old, new = LIST.keys
    now = int(time.time())
    keys = (replace(old, revoked_at=now), new)
    listed = codec.sign(replace(LIST, keys=keys, issued_at=now), ROOT, NETWORK).data
    async with attach_or_spawn(before) as overlay:
        await overlay.present(certificate(OLD, peer=overlay.peer_id, at=now, network=NETWORK))
        async with attach_or_spawn(after) as again:
            fresh = certificate(NEW, peer=overlay.peer_id, at=now, network=NETWORK)
            with pytest.raises(EnvelopeError):
                await again.present(fresh)
            await again.publish_notice(listed)
            await again.present(fresh)
        stranger = dataclasses.replace(after, roots=frozenset({PEER.peer_id}))
        with pytest.raises(LumarisError) as caught:
            async with attach_or_spawn(stranger):
                pass
        assert caught.value.code == "config_invalid"
    await end_shared(before.state_dir)


def replace_config(config: OverlayConfig, key: KeyPair) -> OverlayConfig:
    return dataclasses.replace(
        config, coordinator_keys=frozenset({key.peer_id}), roots=frozenset({ROOT.peer_id})
    )
