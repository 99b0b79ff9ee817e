"""Explains what a restore would do, and why not more is found."""

from __future__ import annotations

from collections.abc import Sequence

from .._bridge.block_list import BlocksAllowed
from .explanation import Explanation, Share, time_text
from .identity import Identities, Kept
from .keys import chain
from .prefix import TIERS, Prefix
from .ram import Id
from .restoring import Asked, Restoring
from .tiers import Tiers
from .worth import Choice, Worth


class Explaining:
    """What ``Store.explain`` does."""

    def __init__(
        self, tiers: Tiers, identities: Identities, worth: Worth, restoring: Restoring
    ) -> None:
        self._tiers = tiers
        self._identities = identities
        self._worth = worth
        self._restoring = restoring

    async def explain(self, asked: Asked, held: int) -> Explanation:
        longest = next(iter((await self._restoring.search(asked)).prefixes), None)
        known = 0 if longest is None else longest.end
        reasons = await self._not_found(asked, known) if known < len(asked.tokens) else []
        if longest is None or known <= held:
            why = "nothing is known" if longest is None else "the sequence holds as many"
            whole = None if longest is None else self._worth.estimate(asked.llama, longest, held)
            restored = 0
        else:
            choice = self._worth.choose(asked.llama, longest, held)
            whole, restored, why = choice.whole, _brought(choice), _why(choice)
            if choice.best is None and (nearer := await self._nearer(asked, longest, held)):
                restored, why = nearer, f"{why}; up to a nearer checkpoint it takes less"
        return Explanation(
            len(asked.tokens),
            held,
            known,
            () if longest is None else self._shares(longest),
            None if whole is None else whole.load,
            None if whole is None else whole.prefill,
            restored,
            why,
            tuple(reasons),
        )

    async def _nearer(self, asked: Asked, refused: Prefix, held: int) -> int:
        """How many tokens are brought of a prefix with a checkpoint in a nearer tier."""
        if refused.checkpoint is None:
            return 0
        for farthest in reversed(TIERS[: TIERS.index(refused.farthest)]):
            for prefix in (await self._restoring.search(asked, farthest)).prefixes:
                if prefix.end > held:
                    choice = self._worth.choose(asked.llama, prefix, held)
                    if choice.best is not None:
                        return _brought(choice)
        return 0

    def _shares(self, prefix: Prefix) -> tuple[Share, ...]:
        shares = []
        for tier in TIERS:
            if not (nbytes := prefix.nbytes_of.get(tier, 0)):
                continue
            parts = zip(prefix.tiers, prefix.parts, strict=True)
            tokens = sum(part.end - part.begin for where, part in parts if where == tier)
            if not prefix.blocks:
                tokens = prefix.end
            seconds = latency = bandwidth = None
            if tier == "ram":
                seconds = 0.0
            elif (line := self._worth.tier(tier).line()) is not None:
                seconds, latency = line.at(nbytes), line.fixed
                bandwidth = 1 / line.each if line.each else None
            shares.append(Share(tier, tokens, nbytes, seconds, latency, bandwidth))
        return tuple(shares)

    # ---- What was not found ---------------------------------------------------------------------

    async def _not_found(self, asked: Asked, known: int) -> list[str]:
        reasons = []
        candidates = await self._identities.candidates(asked.llama, asked.salt)
        if not candidates:
            reasons.append(await self._identities.why_nothing(asked.llama))
        for kept in candidates:
            reasons += await self._of_cache(asked, kept, known)
        behind, away = self._tiers.behind, self._tiers.away
        if behind is not None and behind.hangs:
            reasons.append("the disk hangs, and was not asked")
        if away is not None and away.remote.left_alone:
            reasons.append("the object store is left alone after failures, and was not asked")
        for difference, kept in await self._identities.others(asked.llama, asked.salt):
            other = await self._restoring.search_cache(asked, kept, "disk")
            if other is not None and other.end > known:
                reasons.append(f"{other.end:,} tokens are kept for {difference}")
        return reasons

    async def _of_cache(self, asked: Asked, kept: Kept, known: int) -> list[str]:
        """Why the tokens behind the known ones are not found for one cache."""
        reasons = []
        links = chain(kept.root, asked.tokens, self._tiers.block_tokens)
        links = links[known // self._tiers.block_tokens :]
        ids: list[Id] = []
        for link in links:
            if kept.allowed.blocks:
                ids.append(("block", link.key))
            if kept.allowed.checkpoints:
                ids.append(("checkpoint", link.key))
        ram, behind, away = self._tiers.ram, self._tiers.behind, self._tiers.away
        expired = [each for each in ids if ram.entry(each) and not ram.get(*each)]
        if expired:
            reasons.append(f"the time of {_parts(expired)} in RAM is over")
        if behind is not None and (damaged := await behind.quarantined(ids)):
            reasons.append(f"damaged on the disk and put in quarantine: {_parts(damaged)}")
        if away is not None and (damaged := [each for each in ids if away.remote.unusable(*each)]):
            reasons.append(f"damaged in the object store: {_parts(damaged)}")
        if kept.allowed is BlocksAllowed.WITH_CHECKPOINTS:
            alone = Kept(kept.root, BlocksAllowed.ALONE)
            blocks = await self._restoring.search_cache(asked, alone, "remote")
            if blocks is not None and blocks.end > known:
                reasons.append(
                    f"the blocks of {blocks.end:,} tokens are kept, but no checkpoint "
                    "behind them, which this cache needs"
                )
        return reasons


def _parts(ids: Sequence[Id]) -> str:
    return "1 part" if len(ids) == 1 else f"{len(ids)} parts"


def _brought(choice: Choice) -> int:
    return 0 if choice.prefix is None else choice.prefix.end


def _why(choice: Choice) -> str:
    whole, best = choice.whole, choice.best
    if whole.prefill is None:
        return "the speed of prefill is not known yet"
    compared = f"{time_text(whole.bring)} to bring all, {time_text(whole.prefill)} to evaluate it"
    if choice.trials:
        return f"it is slower, but is measured again ({compared})"
    if best is whole:
        unknown = [tier for tier, seconds in whole.reads.items() if seconds is None]
        if unknown or whole.load is None:
            return f"the speed of {unknown[0] if unknown else 'load'} is not known yet"
        return f"it takes less than prefill ({compared})"
    if best is None:
        return f"it takes more than prefill ({compared})"
    assert best.prefill is not None
    return (
        f"so many save most time ({time_text(best.bring)} to bring, {time_text(best.prefill)} "
        f"to evaluate; {compared})"
    )
