"""Write the parts of docs/releases.md that name the registry and its signer."""

from __future__ import annotations

from recipes.pages import markdown_table
from recipes.release.repository import Registry, parse_repository
from recipes.release.signing import KINDS

PAGE = "docs/releases.md"


def published_part(registry: Registry) -> str:
    """Return what is published, or that nothing is."""
    if not registry.published:
        repository = parse_repository(registry.registry).name
        return f"Nothing is published yet. Images will be in `{repository}`."
    rows = [
        (f"`{one.image}`", f"`{one.tag}`", f"`{one.digest}`", one.day.isoformat())
        for one in registry.published
    ]
    return markdown_table(("Image", "Immutable tag", "Digest", "Day"), rows).strip()


def verify_part(registry: Registry) -> str:
    """Return the commands with which a user verifies an image."""
    repository = parse_repository(registry.registry).name
    types = " ".join(name for name, _ in KINDS.values())
    return f"""```bash
IMAGE={repository}
# A tag names a manifest list with one image for each platform; each image is signed.
IMAGE=$IMAGE@$(docker buildx imagetools inspect --raw "$IMAGE:hopper" |
  jq -er '.manifests[] | select(.platform.architecture == "amd64").digest')
WHO=(--certificate-identity-regexp '{registry.identity}'
  --certificate-oidc-issuer {registry.signer.issuer})
cosign verify "${{WHO[@]}}" "$IMAGE"
for type in {types}; do
  cosign verify-attestation "${{WHO[@]}}" --type "$type" "$IMAGE" >"${{type//:/-}}.json"
done
```

Each file has its statement in `payload`, as base64: `jq -r .payload openvex.json | base64 -d`. An
image that was released with a key of your own needs `WHO=(--key cosign.pub)`."""
