"""A prepared corpus: its tokenizer and its documents. prepare_c4.py writes the folder, everything
else reads it here.

tokenizer.tiktoken, tokenizer.meta.json   the vocabulary, tiktoken's own file, and its special ids
train_*.bin/.idx, val_*.bin/.idx          flat uint16 ids without specials; int64 document offsets
meta.json                                 counts and checksums; a folder without it is unfinished
"""

import hashlib
import os
from array import array
from bisect import bisect_right
from pathlib import Path

import numpy as np

from records import BadInput, read_json, write_atomically

try:
    import resource
except ImportError:  # Windows: no limit on open files that matters
    resource = None

FORMAT = 1  # version of the data folder


class ShardWriter:
    """One .bin/.idx pair, streamed to disk under a temporary name."""

    def __init__(self, stem: Path):
        self.stem, self.offsets, self.bytes = stem, array("q", [0]), 0
        self.sha = hashlib.sha256()
        self.file = open(f"{stem}.bin.tmp", "wb")  # noqa: SIM115

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        data = ids.astype("<u2", copy=False).tobytes()
        self.file.write(data)
        self.sha.update(data)
        self.offsets.append(self.offsets[-1] + len(ids))
        self.bytes += n_bytes

    def close(self) -> dict:
        """Make both files durable under their names; -> counts and checksums."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(f"{self.stem}.bin.tmp", f"{self.stem}.bin")
        idx = np.asarray(self.offsets, dtype="<i8").tobytes()
        write_atomically(Path(f"{self.stem}.idx"), idx)
        return {"documents": len(self.offsets) - 1, "tokens": self.offsets[-1], "bytes": self.bytes,
                "bin_sha256": self.sha.hexdigest(), "idx_sha256": hashlib.sha256(idx).hexdigest()}


class Corpus:
    """Memory-mapped documents of one split of a prepared folder: len(c), c[i], c.lengths.

    Opening checks each file's size against meta.json and the tokenizer's checksum; verify=True also
    reads all shards and checks theirs. BadInput (one line naming the file) for what does not match.

    Attributes: folder (Path), split, meta (dict), n_tokens (int).
    """

    def __init__(self, folder: str | Path, split: str = "train", verify: bool = False):
        self.folder, self.split = Path(folder), split
        if not (self.folder / "meta.json").exists():
            raise BadInput(f"{folder} holds no meta.json; `python prepare_c4.py SOURCE --out "
                           f"{folder}` prepares it, or goes on where it stopped")
        self.meta = read_json(self.folder / "meta.json")
        try:
            if (version := self.meta["format"]) != FORMAT:
                raise BadInput(f"{folder}/meta.json is of format {version}, not {FORMAT}")
            for name, digest in self.meta["tokenizer_files"].items():
                self._check(name, digest)
            shards = [s for s in self.meta["shards"] if s["split"] == split]
            for s in shards:
                self._check(s["bin"], s["bin_sha256"] if verify else None, 2 * s["tokens"])
                self._check(s["idx"], s["idx_sha256"] if verify else None, 8 * s["documents"] + 8)
        except (KeyError, TypeError, AttributeError) as e:
            raise BadInput(f"{folder}/meta.json is damaged ({e!r}); prepare it again") from None
        if not shards:
            raise BadInput(f"{folder}/meta.json lists no shard of split {split!r}")
        if resource:  # a memory map keeps its file open: all of C4 has 3,500, twice the usual limit
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            wanted = 2 * len(shards) + 512
            if 0 <= soft < wanted:  # negative: no limit
                wanted = min(wanted, hard) if hard >= 0 else wanted
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        # np.asarray: slicing a plain array over the map is several times faster than a memmap's
        self.bins = [np.asarray(np.memmap(self.folder / s["bin"], "<u2", "r")) for s in shards]
        self.idxs = [np.asarray(np.memmap(self.folder / s["idx"], "<i8", "r")) for s in shards]
        for s, idx in zip(shards, self.idxs):
            if idx[0] != 0 or idx[-1] != s["tokens"]:
                raise BadInput(f"{folder}/{s['idx']} does not end at the tokens of meta.json")
        # index of each shard's first document
        self.first = np.cumsum([0] + [s["documents"] for s in shards]).tolist()
        self.n_tokens = sum(s["tokens"] for s in shards)

    def _check(self, name: str, digest: str | None, size: int | None = None) -> None:
        path, why = self.folder / name, None
        if not path.is_file():
            why = "is listed in meta.json but missing"
        elif size is not None and (found := path.stat().st_size) != size:
            why = f"has {found} bytes, meta.json says {size}"
        elif digest:
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                    why = "does not have the sha256 in meta.json"
        if why:
            raise BadInput(f"{path} {why}; prepare the folder again")

    def __len__(self) -> int:
        return self.first[-1]

    def __getitem__(self, i: int) -> np.ndarray:
        """Token ids of document i, a read-only (n,) uint16 view of the file."""
        if not 0 <= i < self.first[-1]:
            raise IndexError(f"document {i} of {self.first[-1]}")
        shard = bisect_right(self.first, i) - 1
        idx, j = self.idxs[shard], i - self.first[shard]
        return self.bins[shard][idx[j] : idx[j + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(n_docs,) int32: tokens of each document, specials not counted. 1.5 GB for all of C4."""
        return np.concatenate([np.diff(idx).astype(np.int32) for idx in self.idxs])
