"""`lumaris challenge`: have a seller prove the cores and the memory that it advertises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lumaris.cli.options import CONTEXT, SIZE, Settings, buyer_options
from lumaris.cli.output import emit, fields, peer_of, size_of
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris.challenges import Proof


@click.command("challenge", context_settings=CONTEXT)
@click.argument("seller")
@click.option("--cores", type=click.IntRange(1, 256), help="Hardware threads to prove at once.")
@click.option("--memory", type=SIZE, help="Memory to prove, in up to 16 fills held at once.")
@buyer_options
@click.pass_obj
def challenge(settings: Settings, seller: str, cores: int | None, memory: int | None) -> None:
    """Have a seller prove its cores or memory.

    SELLER is a peer id, or the end of one as `lumaris offers` shows it. Without --cores and
    --memory one core is asked for. It costs nothing; a seller answers one challenge a minute.
    """
    import trio

    from lumaris import profile as profiles

    profile = profiles.load(state=settings.state, coordinator=settings.coordinator)
    cores = cores if cores is not None or memory is not None else 1
    proofs = trio.run(_prove, profile, seller.strip(), cores, memory)
    found = [_plain(proof) for proof in proofs]
    if settings.json:
        emit({"proofs": found})
        return
    for proof in proofs:
        fields(_lines(proof))


async def _prove(profile: Any, name: str, cores: int | None, memory: int | None) -> list[Proof]:
    from lumaris.challenges import find_seller, open_prober
    from lumaris_protocol.limits import CHALLENGE_FILLS_MAX, GIB

    proofs = []
    async with open_prober(profile) as (prober, overlay):
        advert = await find_seller(overlay, name)
        if cores is not None:
            proofs.append(await prober.cores(advert, parallel=cores))
        if memory is not None:
            fills = min(-(-memory // (2 * GIB)), CHALLENGE_FILLS_MAX)
            if not fills:
                raise LumarisError("usage", "--memory is more than nothing.")
            proofs.append(await prober.memory(advert, memory_bytes=memory // fills, parallel=fills))
    return proofs


def _plain(proof: Proof) -> dict[str, Any]:
    unit, said = ("fuel_s", "claimed") if proof.kind == "cores" else ("bytes", "asked")
    return {
        "seller": proof.seller,
        "kind": proof.kind,
        "parallel": proof.parallel,
        "elapsed_s": proof.elapsed_s,
        f"{said}_{unit}": proof.claimed,
        f"proven_{unit}": proof.proven,
        "checked": proof.checked,
    }


def _lines(proof: Proof) -> list[tuple[str, object]]:
    if proof.kind == "cores":
        claimed, proven = (f"{rate / 1e9:.2f} Gfuel/s" for rate in (proof.claimed, proof.proven))
        share = f" ({proof.share:.0%})" if proof.claimed else ""
    else:
        claimed, proven, share = size_of(proof.claimed), size_of(proof.proven), ""
    return [
        ("seller", peer_of(proof.seller)),
        (proof.kind, f"{proof.parallel} at once in {proof.elapsed_s:.2f} s"),
        ("claimed" if proof.kind == "cores" else "asked", claimed),
        ("proven", f"{proven}{share}"),
    ]
