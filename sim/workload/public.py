"""Public traces that `coserve fetch` knows: where they are, their checksum, and where they go.

Only files whose checksum is known are here. Sources of the sums: the Azure files were summed at the
pinned commit; BurstGPT keeps its files in Git LFS, whose pointer states sum and size.
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.errors import nearest

AZURE = (
    "https://raw.githubusercontent.com/Azure/AzurePublicDataset/790921015d50dd6aae7f7e47f39ba0e235ad6b08/data"
)
BURSTGPT = "https://github.com/HPMLL/BurstGPT/raw/5d93d820d9b6bee4e26914df003e5713538164ae/data"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicFile:
    """One downloadable file."""

    name: str
    url: str
    path: str
    """Below the data folder."""
    licence: str
    sha256: str | None
    """None: not known, the sum is printed instead of checked."""
    size_bytes: int | None


PUBLIC_FILES = (
    PublicFile(
        name="azure_conv",
        url=f"{AZURE}/AzureLLMInferenceTrace_conv.csv",
        path="azure/AzureLLMInferenceTrace_conv.csv",
        licence="CC-BY-4.0; cite Splitwise, ISCA 2024",
        sha256="2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        size_bytes=719_188,
    ),
    PublicFile(
        name="azure_code",
        url=f"{AZURE}/AzureLLMInferenceTrace_code.csv",
        path="azure/AzureLLMInferenceTrace_code.csv",
        licence="CC-BY-4.0; cite Splitwise, ISCA 2024",
        sha256="54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
        size_bytes=320_117,
    ),
    PublicFile(
        name="burstgpt",
        url=f"{BURSTGPT}/BurstGPT_1.csv",
        path="burstgpt/BurstGPT_1.csv",
        licence="CC-BY-4.0; cite BurstGPT, arXiv 2401.17644",
        sha256="4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122",
        size_bytes=52_283_111,
    ),
)

UNSUMMED_URLS = {
    "mooncake/conversation_trace.jsonl": (
        "https://raw.githubusercontent.com/kvcache-ai/Mooncake/"
        "a2a4b18ac537fd798d50e6e9f57031ce86419a37/FAST25-release/traces/conversation_trace.jsonl"
    ),
}
"""Path below the data folder -> URL of files without a known checksum, for `coserve fetch --url`."""


def find_public(name: str, files: tuple[PublicFile, ...] = PUBLIC_FILES) -> PublicFile:
    """The file of that name; ValueError names the nearest."""
    for file in files:
        if file.name == name:
            return file
    known = [file.name for file in files]
    raise ValueError(f"no public trace {name!r}; known are {', '.join(known)}{nearest(name, known)}")


def fetch_hint(path: str) -> str:
    """The command that fetches the file at `path` below the data folder, as a half sentence, or ''."""
    for file in PUBLIC_FILES:
        if file.path == path:
            return f"; get it with `coserve fetch {file.name}`"
    if path in UNSUMMED_URLS:
        return f"; get it with `coserve fetch --url {UNSUMMED_URLS[path]} {path}`"
    return ""
