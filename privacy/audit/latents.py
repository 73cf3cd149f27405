"""That a latents stage encoded the records of the stage it names, all of them and no others: one claim a stage."""

from __future__ import annotations

from collections.abc import Mapping

from privacy.audit.claims import Claim, judged, short
from privacy.audit.evidence import Manifest, RunEvidence
from privacy.pii.latent_manifests import LatentManifest, sources, verify_latents, verify_sources
from privacy.pii.manifests import ManifestError, ShardManifest, verify_leaves


def latent_claims(evidence: RunEvidence, *, shards: bool) -> list[Claim]:
    """What each latents stage says of its shards, against those that they were made from and, where they lie here,
    every byte of both.

    A stage of an older run names no Merkle root, and then there is nothing to claim.
    """
    claims: list[Claim] = []
    for manifest in evidence.manifests:
        root = manifest.section("metrics").get("shards_root")
        if isinstance(root, str) and manifest.content.get("kind") == LatentManifest.KIND:
            source = manifest.section("config").get("data_from")
            claim = f"the latents of {manifest.stage} are of the records of {source}, each once, and of no others"
            made_of = evidence.manifest(source)
            claims.append(
                judged(claim, lambda one=manifest, root=root, of=made_of: _verify(one, root, of, read=shards))
            )
    return claims


def _verify(manifest: Manifest, root: str, source: Manifest | None, *, read: bool) -> str:
    """What was seen; ManifestError where shards, manifests, roots and the stage that was encoded do not agree."""
    folder = manifest.path.parent
    if source is None:
        raise ManifestError(f"{manifest.path} names a stage to encode that is not here: restore its manifest")
    before, of = source.path.parent, source.stage
    found = verify_leaves(LatentManifest, folder, root)
    if set(manifest.section("metrics", "splits")) != {one.split for one in found}:
        raise ManifestError(f"{manifest.path} names other splits than its shard manifests")
    if {manifest.section("metrics").get("vae")} != {one.vae for one in found}:
        raise ManifestError(f"{manifest.path} names another VAE than its shard manifests")
    filtered = source.content.get("kind") == ShardManifest.KIND and "shards_root" in source.section("metrics")
    here = any(before.glob("[!.]*/*.tar"))
    seen = f"root {short(root)} recomputed from {len(found)} shard manifests"
    if filtered or here:
        verify_sources(folder, found, sources(before, filtered=filtered))
        seen += f", each of which names the index of its shard of {of}" + ("" if filtered else ", which is no filter")
    if not read or not any(folder.glob("[!.]*/*.tar")):
        return f"{seen}; the latents were not read" + (": they are not here" if read else "")
    ours, theirs = verify_latents(folder, found, before if here else None)
    _require_roots(manifest, ours)
    _require_roots(source, theirs if here else {})
    records = sum(one.records for one in found)
    if not here:
        return f"{seen}, and from every byte of the {records:,} records in them; those of {of} are not here"
    return f"{seen}; every byte of {records:,} records was read: key, unit, class and caption are those of {of}"


def _require_roots(manifest: Manifest, roots: Mapping[str, str]) -> None:
    for split, root in roots.items():
        if root != (stated := manifest.section("metrics", "splits", split).get("root")):
            raise ManifestError(f"the records of split {split} have root {root}, and {manifest.path} names {stated}")
