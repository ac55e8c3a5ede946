"""What a preparation made, as a table for a terminal."""

from dataclasses import dataclass
from pathlib import Path

from thriftlab.data.files import printable
from thriftlab.data.manifest import Manifest, fingerprint


@dataclass(frozen=True)
class Summary:
    """What lies in `path`; `str` is the table that is shown."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]  # what the user should know besides

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.manifest)

    def __str__(self) -> str:
        head = f"{'source':14}{'split':12}{'documents':>10}{'tokens':>14}{'MB':>10}"
        lines = [
            f"{name:14}{split:12}{entry['documents']:10,}{entry['tokens']:14,}{entry['bytes'] / 1e6:10.3f}"
            for name, source in self.manifest["sources"].items()
            for split, entry in (("train", source["train"]), ("validation", source["validation"]))
        ]
        origins = [
            f"{name:14}{package['registry']} {package['name']} {package['version']}, {package['licence']}, "
            f"sha256 {package['sha256'][:16]}"
            for name, packages in self.manifest["made"].get("packages", {}).items()
            for package in packages
        ]
        passed = [
            f"{name:14}passed over: {tally['count']:,} {reason} ({', '.join(tally['first'])}"
            f"{', ...' if tally['count'] > len(tally['first']) else ''})"
            for name, reasons in self.manifest["made"].get("passed_over", {}).items()
            for reason, tally in reasons.items()
        ]
        drops = [f"{count:,} {reason}" for reason, count in self.manifest.get("drops", {}).items() if count]
        tokenizer = self.manifest["tokenizer"]
        foot = [
            f"dropped documents: {', '.join(drops) or 'none'}",
            f"tokenizer {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens; data {self.fingerprint[:16]}",
        ]
        return "\n".join([printable(self.path), head, *lines, *origins, *passed, *foot, *self.notes])
