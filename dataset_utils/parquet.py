"""Dataset folders of Hugging Face: parquet files with a column of images and one of labels, read by pyarrow."""

import json
import os
import re
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from dnnlib.images import Label, is_foreign
from dnnlib.limits import check_regular, check_unpacked

OTHER_SPLIT = "in other splits"

_SUFFIX = ".parquet"
_LABELS = ("label", "labels", "fine_label", "fine_labels")
_COARSE = ("coarse_label", "coarse_labels")
_IMAGES = ("image", "img", "images")
_HELD = 1 << 28  # bytes of image files that are held


def find_parquet(path: str) -> list[str]:
    """The parquet files in a folder and its subfolders, sorted; of a file that is one, the file."""
    if not os.path.isdir(path):
        return [path] if path.lower().endswith(_SUFFIX) else []
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not is_foreign(name)]
        found += [os.path.join(folder, n) for n in files if n.lower().endswith(_SUFFIX) and not is_foreign(n)]
    return sorted(found)


@dataclass
class _Group:
    """Rows of a file that are read together."""

    file: Any  # pyarrow.parquet.ParquetFile
    path: str
    number: int


class ParquetImages:
    """The image files in parquet files, one after the other, and their labels.

    Of several splits (train, test), as the names of files or of their folders tell, the one called train is taken. The
    column of images is the one that the features of Hugging Face call so, or else one of the usual names; its values
    are {bytes, path}, or bytes. Rows are read group by group when they are needed, in any number of threads.

    Parameters
    ----------
    path : folder with parquet files, or one file
    coarse : take the column of coarse labels

    Attributes
    ----------
    names : of each image
    labels : of each image an int, or None; None if there is no column of labels
    classes : {name: label} where the features name the classes
    left_out : number of images in other splits
    warnings : sentences that a user should read

    Raises
    ------
    OSError, ValueError
        If pyarrow is missing, or a file is damaged or of another form.
    """

    def __init__(self, path: str, coarse: bool = False):
        self._arrow = _import(path)
        self.warnings: list[str] = []
        self.left_out: Counter[str] = Counter()
        files = self._choose_split(path, find_parquet(path))
        opened = [(file, self._open(file)) for file in files]
        first, schema = opened[0][0], opened[0][1].schema_arrow
        for file, parquet in opened:
            if parquet.schema_arrow.names != schema.names:
                raise ValueError(f'"{file}" has other columns than "{first}"; give --source=ONE_FOLDER_OR_FILE.')
        features = _features(schema)
        self._column = self._image_column(schema, features, first)
        self._groups = [_Group(parquet, file, i) for file, parquet in opened for i in range(parquet.num_row_groups)]
        self._ends = list(accumulate(g.file.metadata.row_group(g.number).num_rows for g in self._groups))
        self.names = [f"{file}[{i}]" for file, parquet in opened for i in range(parquet.metadata.num_rows)]
        self.labels, self.classes = self._read_labels(opened, schema, features, coarse)
        self._held: OrderedDict[int, list[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, i: int) -> bytes:
        """The i-th image file."""
        number = bisect_right(self._ends, i)
        with self._lock:
            rows = self._held.pop(number, None)
            if rows is None:
                rows = self._read_group(self._groups[number])
                held = sum(sum(map(len, other)) for other in self._held.values())
                while self._held and held + sum(map(len, rows)) > _HELD:
                    held -= sum(map(len, self._held.popitem(last=False)[1]))
            self._held[number] = rows
        return rows[i - self._ends[number]]  # counted from the end of the group

    def _open(self, path: str) -> Any:
        check_regular(path)
        try:
            return self._arrow.ParquetFile(path)
        except Exception as err:  # damaged files bring about errors of many kinds
            raise ValueError(f'"{path}" cannot be read as a parquet file: {_line(err)}.') from err

    def _choose_split(self, path: str, files: list[str]) -> list[str]:
        splits: dict[str, list[str]] = {}
        for file in files:
            splits.setdefault(_split(file), []).append(file)
        if len(splits) == 1:
            return files
        if "train" not in splits:
            raise ValueError(
                f'"{path}" holds the splits {", ".join(sorted(splits))}, and none is called train; give one file as '
                "--source, or a folder with the files of one split."
            )
        others = [file for split, those in splits.items() if split != "train" for file in those]
        self.left_out[OTHER_SPLIT] = sum(self._open(file).metadata.num_rows for file in others)
        return splits["train"]

    def _image_column(self, schema: Any, features: dict[str, Any], path: str) -> str:
        types = [name for name, feature in features.items() if feature.get("_type") == "Image"]
        columns = [name for name in types if name in schema.names] or [n for n in _IMAGES if n in schema.names]
        if not columns:
            raise ValueError(f'"{path}" has no column of images ("image"), only: {", ".join(schema.names)}.')
        if len(columns) > 1:
            self.warnings.append(f'Of the columns of images {", ".join(columns)}, "{columns[0]}" is taken.')
        return columns[0]

    def _read_labels(
        self, opened: list[tuple[str, Any]], schema: Any, features: dict[str, Any], coarse: bool
    ) -> tuple[list[Label | None] | None, dict[str, int] | None]:
        column = next((name for name in (_COARSE if coarse else _LABELS) if name in schema.names), None)
        if column is None:
            if coarse:
                raise ValueError(f'"{opened[0][0]}" has no column "{_COARSE[0]}"; leave out --coarse.')
            others = ", ".join(f'"{name}"' for name in schema.names if name != self._column)
            if others:
                self.warnings.append(f'No column is called "label"; not read: {others}.')
            return None, None
        labels: list[Any] = []
        for path, parquet in opened:
            try:
                labels += parquet.read(columns=[column])[column].to_pylist()
            except Exception as err:  # as above
                raise ValueError(f'Column "{column}" of "{path}" cannot be read: {_line(err)}.') from err
        names = features.get(column, {}).get("names")
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        # Hugging Face writes -1 for a label that is kept secret.
        return [None if label == -1 else label for label in labels], (
            {name: i for i, name in enumerate(names)} if named else None
        )

    def _read_group(self, group: _Group) -> list[bytes]:
        meta = group.file.metadata.row_group(group.number)
        where = f'Row group {group.number} of "{group.path}"'
        try:
            check_unpacked(meta.total_byte_size, os.path.getsize(group.path))
            rows = group.file.read_row_group(group.number, columns=[self._column])[self._column].to_pylist()
        except Exception as err:  # as above
            raise ValueError(f"{where} cannot be read: {_line(err)}.") from err
        files = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
        if len(files) != meta.num_rows:
            raise ValueError(f"{where} has {len(files)} rows instead of {meta.num_rows}.")
        for row, file in zip(rows, files):
            if not isinstance(file, bytes):
                named = f': only the name "{row["path"]}"' if isinstance(row, dict) and row.get("path") else ""
                raise ValueError(f'{where} holds no image files in its column "{self._column}"{named}.')
        return files


def _import(path: str) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as err:
        raise ValueError(
            f'"{path}" holds parquet files, which need pyarrow: pip install pyarrow, or the project with the extra '
            '"parquet".'
        ) from err
    return pyarrow.parquet


def _features(schema: Any) -> dict[str, Any]:
    """The features that Hugging Face's library writes beside the schema: {column: {"_type": "Image", ...}}."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _split(path: str) -> str:
    """train for train-00000-of-00002.parquet, train/0000.parquet and train.parquet."""
    name = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", Path(path).stem)
    return (name if re.search("[a-zA-Z]", name) else Path(path).parent.name).lower()


def _line(err: Exception) -> str:
    return " ".join(str(err).split()).rstrip(".") or type(err).__name__
